"""Texts that hide a fact: exactly as long as asked, with one answer, which the question does not give."""

import random
import re

import pytest

from data_pipeline.needles.arrange import arrange, words_of
from data_pipeline.needles.tasks import TASKS, VARIABLES, make_episode
from data_pipeline.tokenizer.published import load_tokenizer
from tests.support.needles import solve


def text_of(task: str, seed: int, depth: float, length: int) -> tuple[str, str]:
    """(text, right continuation)"""
    generator = random.Random(seed)
    episode = make_episode(task, generator)
    return "".join(arrange(episode, depth, length, words_of, generator)), episode.answer


def shortest(task: str, seed: int = 0) -> int:
    """The words of a text without filler, which the refusal of a shorter one says."""
    with pytest.raises(ValueError, match="too little for the task") as refusal:
        text_of(task, seed, 0.5, 1)
    return int(re.search(r"give (\d+) or more", str(refusal.value))[1])


@pytest.mark.parametrize("task", TASKS)
def test_a_slow_reader_finds_the_answer(task):
    answers = set()
    for seed in range(40):
        least = shortest(task, seed)
        for depth, length in ((0.0, least), (1.0, least + 1), (0.0, 300), (1.0, 301), (0.37, 1000)):
            text, answer = text_of(task, seed, depth, length)
            assert solve(text) == answer, text
            answers.add(answer)
    assert len(answers) == 40


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["bytes", "builtin"])
def test_a_prompt_has_exactly_as_many_tokens_as_asked(task, name):
    tokenizer = load_tokenizer(name)

    def cut(text):
        return tokenizer.encode(text).tolist()

    for seed, length in ((0, 600), (1, 601), (2, 1009), (3, 5000)):
        generator = random.Random(seed)
        episode = make_episode(task, generator)
        ids = arrange(episode, generator.random(), length, cut, generator)
        text = tokenizer.decode(ids)
        assert len(ids) == length and text.startswith(episode.intro) and text.endswith(" " + episode.question)
        assert all(text.count(needle) == 1 for needle in episode.needles)
        assert solve(text) == episode.answer
        if name == "bytes":
            assert cut(text) == ids


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_does_not_stand_in_the_question(task):
    for seed in range(200):
        episode = make_episode(task, random.Random(seed))
        assert episode.is_answered_by(episode.answer)
        assert not episode.is_answered_by(episode.question) and not episode.is_answered_by(episode.intro)
        assert not any(part in episode.question + episode.intro for part in episode.expected)


@pytest.mark.parametrize("task", TASKS)
def test_depth_is_the_share_of_filler_before_the_needle_that_is_asked_for(task):
    def before(depth: float) -> int:
        """Words of filler before the needle, which other needles are not."""
        generator = random.Random(5)
        episode = make_episode(task, generator)
        words = arrange(episode, depth, 400, words_of, generator)
        needles = [words_of(" " + needle) for needle in episode.needles]
        place = next(
            i for i in range(len(words)) if words[i : i + len(needles[episode.asked])] == needles[episode.asked]
        )
        text = "".join(words[:place])
        others = sum(len(words) for needle, words in zip(episode.needles, needles) if needle in text)
        return place - len(words_of(episode.intro)) - others

    room = before(1.0)
    assert before(0.0) == 0 and room > 200
    assert [before(depth) for depth in (0.25, 0.5, 0.9)] == [round(depth * room) for depth in (0.25, 0.5, 0.9)]


def test_a_chain_of_variables_stands_in_its_order():
    for seed in range(30):
        text, answer = text_of("variables", seed, 0.8, 500)
        names = re.findall(r"VAR ([A-Z]{3}) =", text)
        chain = answer.strip().split(", ")
        assert len(names) == 2 * VARIABLES and [name for name in names if name in chain] == chain


def test_what_counts_as_an_answer():
    episode = make_episode("passkey", random.Random(0))
    key = episode.expected[0]
    assert all(episode.is_answered_by(text) for text in (f" {key}", f"{key}. The", f" the number {key}, not 12345"))
    assert episode.is_answered_by(f" the KEY is {key}") and episode.is_answered_by(f" NOT sure: {key}")
    assert not any(episode.is_answered_by(text) for text in ("", " ", key[:4], f"{key}1", f"12345 {key}", " The grass"))
    episode = make_episode("variables", random.Random(0))
    assert episode.is_answered_by(" " + " and ".join(reversed(episode.expected)) + ".")
    assert episode.is_answered_by(f" VAR {', VAR '.join(episode.expected)}, 3 of them")
    assert not episode.is_answered_by(", ".join(episode.expected[:-1])) and len(set(episode.expected)) == VARIABLES
    assert not episode.is_answered_by(", ".join(episode.expected[:1] * VARIABLES))


def test_words_of_cuts_a_text_without_loss():
    assert words_of("The pass key is 68. Go!") == ["The", " pass", " key", " is", " ", "6", "8", ".", " Go", "!"]


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="task 'needle': must be one of passkey, single"):
        make_episode("needle", random.Random(0))
