"""Tasks that ask for a fact which stands somewhere in a long text.

    passkey       "The pass key is 68975. Remember it. 68975 is the pass key.", hidden in sentences that repeat
                  (Mohtashami and Jaggi, arXiv:2305.16300)
    single        the number of one thing, hidden in the same sentences
    multi-key     the numbers of several things, of which one is asked for
    distractors   nothing but numbers of things: the whole text is needles, of which one is asked for
    variables     two chains of variables that get their values from each other; all of one chain are asked for

The last four are RULER's (Hsieh et al., arXiv:2404.06654): single needle, multi-key needle, multi-key needle in a
haystack of needles, variable tracking. Their words are this project's own, so that no text has to be downloaded.

An `Episode` is one such question before anything is said of how long the text is; `arrange` gives it a length.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from data_pipeline.needles.words import ADJECTIVES, LETTERS, NOISE, NOUNS

Task = Literal["passkey", "single", "multi-key", "distractors", "variables"]
TASKS: tuple[str, ...] = get_args(Task)

KEYS = 4
"""Things of `multi-key`."""
CHAINS, VARIABLES = 2, 4
"""Chains of `variables`, and variables in each."""
_DIGITS = 5
_NUMBER, _NAME = re.compile(r"\d+"), re.compile(r"\b[A-Z]{3}\b")


@dataclass(frozen=True)
class Episode:
    """A question with all that the text before it must say."""

    task: str
    intro: str
    """How the text begins."""
    needles: tuple[str, ...]
    """Sentences to be hidden; those of a chain of variables in its order."""
    asked: int
    """The first needle that the answer stands in; its place is the depth."""
    filler: Callable[[], Iterator[str]]
    """The function that starts the sentences around the needles, without an end and always the same."""
    question: str
    """How the text ends. What comes next is the answer."""
    expected: tuple[str, ...]
    """The numbers or names that the answer consists of, in the order of the text."""
    guesses: int
    """How many answers there could be, for somebody who has not read the text."""
    rivals: int | None
    """How many there are for somebody who has not read the question; None if that depends on the text's length."""

    @property
    def answer(self) -> str:
        """The answer as it continues the question."""
        return " " + ", ".join(self.expected)

    def is_answered_by(self, text: str) -> bool:
        """Return whether a continuation begins with the right numbers or names, those of a list in any order."""
        found = (_NAME if self.task == "variables" else _NUMBER).findall(text)
        if "VAR" not in self.expected:  # the text says `VAR ABC`, and so may the answer
            found = [one for one in found if one != "VAR"]
        return sorted(found[: len(self.expected)]) == sorted(self.expected)


def make_episode(task: str, generator: random.Random) -> Episode:
    """Draw an episode.

    Args:
        task: One of `TASKS`.
        generator: Where the numbers come from. Only its `random()` is called, which is promised to give the same in
            every version of Python.

    Raises:
        ValueError: There is no such task.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r}: must be one of {', '.join(TASKS)}")
    if task == "passkey":
        return _passkey(generator)
    return _variables(generator) if task == "variables" else _numbers(task, generator)


def _passkey(generator: random.Random) -> Episode:
    key = _number(generator)
    return Episode(
        task="passkey",
        intro="There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz "
        "you about the important information there.",
        needles=(f"The pass key is {key}. Remember it. {key} is the pass key.",),
        asked=0,
        filler=_noise,
        question="What is the pass key? The pass key is",
        expected=(key,),
        guesses=9 * 10 ** (_DIGITS - 1),
        rivals=1,
    )


def _numbers(task: str, generator: random.Random) -> Episode:
    """Draw an episode of things that have numbers."""
    things = _distinct(_thing, KEYS if task == "multi-key" else 1, generator)
    numbers = _distinct(_number, len(things), generator)
    needles = tuple(_has_number(thing, number) for thing, number in zip(things, numbers))
    asked = _below(len(needles), generator)
    seed, known = generator.random(), set(things) | set(numbers)
    return Episode(
        task=task,
        intro="Some things have a number, which is hidden in the following text. Memorize all numbers. I will ask for "
        "one of them.",
        needles=needles,
        asked=asked,
        filler=(lambda: _other_numbers(seed, known)) if task == "distractors" else _noise,
        question=f"What is the number of the {things[asked]}? The number of the {things[asked]} is",
        expected=(numbers[asked],),
        guesses=9 * 10 ** (_DIGITS - 1),
        rivals=None if task == "distractors" else len(things),
    )


def _variables(generator: random.Random) -> Episode:
    names = _distinct(_name, CHAINS * VARIABLES, generator)
    numbers = _distinct(_number, CHAINS, generator)
    chains = [names[i * VARIABLES : (i + 1) * VARIABLES] for i in range(CHAINS)]
    lines = [
        [f"VAR {name} = {value}." for name, value in zip(chain, [number, *chain])]
        for chain, number in zip(chains, numbers)
    ]
    asked = _below(CHAINS, generator)
    return Episode(
        task="variables",
        intro="Variables are set in the following text. Memorize where each of them gets its value from.",
        needles=tuple(line for chain in lines for line in chain),
        asked=asked * VARIABLES,
        filler=_noise,
        question=f"Which {VARIABLES} variables have the value {numbers[asked]}? They are",
        expected=tuple(chains[asked]),
        guesses=math.comb(len(LETTERS) ** 3, VARIABLES),
        rivals=CHAINS,
    )


def _noise() -> Iterator[str]:
    while True:
        yield NOISE


def _other_numbers(seed: float, known: set[str]) -> Iterator[str]:
    """Yield needles about other things, with other numbers, than those that are known."""
    generator = random.Random(repr(seed))
    while True:
        thing, number = _thing(generator), _number(generator)
        if thing not in known and number not in known:
            yield _has_number(thing, number)


def _has_number(thing: str, number: str) -> str:
    return f"The number of the {thing} is {number}."


def _below(count: int, generator: random.Random) -> int:
    return int(generator.random() * count)


def _number(generator: random.Random) -> str:
    least = 10 ** (_DIGITS - 1)
    return str(least + _below(9 * least, generator))


def _thing(generator: random.Random) -> str:
    return f"{ADJECTIVES[_below(len(ADJECTIVES), generator)]} {NOUNS[_below(len(NOUNS), generator)]}"


def _name(generator: random.Random) -> str:
    return "".join(LETTERS[_below(len(LETTERS), generator)] for _ in range(3))


def _distinct(draw: Callable[[random.Random], str], count: int, generator: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(generator)] = None
    return list(found)
