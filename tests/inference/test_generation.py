"""Completions of batches: the same as of each prompt by itself, and stops, seeds, samples and log-probabilities."""

import copy
import math

import pytest
import torch

from data_pipeline import Tokenizer
from data_pipeline.tokenizer.published import load_tokenizer
from gptoss_dist import GptOss, ModelConfig
from gptoss_dist.inference import GREEDY, Sampling, complete
from gptoss_dist.inference.stops import GrowingText
from gptoss_dist.model.init import initialize
from tests.support.ranks import MODEL

PROMPTS = [[5], [7, 8, 9] * 9, list(range(60, 77)), [7, 8]]


@pytest.fixture(scope="module")
def model() -> GptOss:
    model = GptOss(ModelConfig(**MODEL | {"initializer_range": 0.3, "max_position_embeddings": 256}))
    initialize(model, seed=0)
    return model.eval()


@torch.no_grad()
def recomputed(model: GptOss, prompt: list[int], new: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens and their log-probabilities, without a cache and without a batch."""
    ids, logprobs = list(prompt), []
    for _ in range(new):
        logprob_V = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        ids.append(int(logprob_V.argmax()))
        logprobs.append(float(logprob_V.max()))
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_batch_gives_what_each_prompt_gives_by_itself(model, chunk):
    found = complete(model, PROMPTS, GREEDY, max_new_tokens=50, logprobs=True, prefill_chunk=chunk)
    for prompt, (one,) in zip(PROMPTS, found):
        ids, logprobs = recomputed(model, prompt, 50)
        assert one.ids == ids and one.finish == "length" and len(set(ids)) > 5
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(logprobs), atol=1e-4, rtol=1e-4)


def test_stop_ids_end_each_sample_for_itself(model):
    whole = [ids for ids, _ in (recomputed(model, prompt, 40) for prompt in PROMPTS)]
    stops = {whole[0][3], whole[1][9], whole[2][17]}
    for ids, (one,) in zip(whole, complete(model, PROMPTS, GREEDY, max_new_tokens=40, stop_ids=sorted(stops))):
        end = next((at for at, token in enumerate(ids) if token in stops), None)
        assert one.ids == ids[:end] and one.finish == ("length" if end is None else "stop")


def test_a_seed_decides_a_sample_whatever_is_beside_it(model):
    sampling = Sampling(temperature=1.3, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
    seeds = list(range(8))
    options = {"max_new_tokens": 30, "logprobs": True}
    together = complete(model, PROMPTS, sampling, n=2, seeds=seeds, **options)
    assert together == complete(model, PROMPTS, sampling, n=2, seeds=seeds, **options)
    flat = [one for pair in together for one in pair]
    assert len({tuple(one.ids) for one in flat}) == 8
    for seed, one in enumerate(flat):
        ((alone,),) = complete(model, [PROMPTS[seed // 2]], sampling, seeds=[seed], **options)
        assert alone.ids == one.ids
    torch.manual_seed(3)
    assert complete(model, PROMPTS, sampling, n=2, **options) != complete(model, PROMPTS, sampling, n=2, **options)


def test_a_penalty_forbids_what_was_seen(model):
    (free, bound) = (
        complete(model, PROMPTS, Sampling(temperature=0.0, repetition_penalty=penalty), max_new_tokens=40)
        for penalty in (1.0, 1e6)
    )
    assert any(len(set(one.ids)) < 40 for (one,) in free)
    for prompt, (one,) in zip(PROMPTS, bound):
        assert len(set(one.ids)) == 40 and not set(one.ids) & set(prompt)


def test_stop_texts_across_tokens_and_characters(model):
    tokenizer = load_tokenizer("bytes")
    text = GrowingText(tokenizer, ["ß\n\n".encode(), b"xyz"])
    shown = ""
    for byte in "aßxyßß\n\nmore".encode():
        stopped = text.add(byte)
        shown += text.news(final=stopped)
        assert not set(shown) & set("\n�") and not shown.endswith("xyßß")
        if stopped:
            break
    assert shown == str(text) == "aßxyß" and text.tokens == len("aßxyß".encode())

    pieces = {}
    options = {"max_new_tokens": 40, "tokenizer": tokenizer, "vocab_size": 128}
    whole = complete(model, PROMPTS, GREEDY, **options)
    stops = [one.text[9:12] for (one,) in whole[:2]]
    show = lambda number, piece: pieces.setdefault(number, []).append(piece)  # noqa: E731
    found = complete(model, PROMPTS, GREEDY, stop_texts=stops, on_text=show, **options)
    for number, ((one,), (free,)) in enumerate(zip(found, whole)):
        ends = [at for stop in stops if (at := free.text.find(stop)) >= 0]
        assert one.finish == ("stop" if ends else "length") and one.ids == free.ids[: min(ends, default=40)]
        assert "".join(pieces[number]) == one.text == tokenizer.decode(one.ids) and len(pieces[number]) > 3


@torch.no_grad()
def test_ids_without_a_token_are_never_written_and_count_in_log_probabilities(model):
    bytes_ = load_tokenizer("bytes")
    # Like o200k_base: ids without a token lie below the largest one.
    holes = Tokenizer("holes", bytes_.ranks, bytes_.pattern, {"<|endoftext|>": 262, "<|last|>": 266})
    written = {*range(256), 262, 266}
    assert holes.ids_without_token(272).tolist() == sorted(set(range(272)) - written)
    assert holes.ids_without_token(258).tolist() == [256, 257] and not holes.ids_without_token(256).size
    for options, allowed in (({"vocab_size": 6}, set(range(6))), ({"tokenizer": holes}, written)):
        for (one,) in complete(model, PROMPTS, Sampling(temperature=50.0), max_new_tokens=40, **options):
            assert set(one.ids) <= allowed and len(set(one.ids)) > 5

    favoured = copy.deepcopy(model)
    favoured.lm_head.weight[256:] *= 4
    options = {"tokenizer": holes, "n": 2, "vocab_size": 265, "max_new_tokens": 12, "logprobs": True}
    for prompt, samples in zip(PROMPTS, complete(favoured, PROMPTS, GREEDY, **options)):
        for one in samples:
            logits = favoured(torch.tensor([prompt + one.ids]))[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(one.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(one.logprobs), expected, atol=1e-4, rtol=1e-4)
            assert set(one.ids) <= written - {266}
            logits[:, sorted(set(range(272)) - written | {266})] = -torch.inf
            assert logits.argmax(-1).tolist() == one.ids and min(one.logprobs) < -1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", 1e39),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", math.nan),
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", 1e-46),
        ("repetition_penalty", 1e39),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 has no token"),
        ({"prompts": [[1, 272]]}, "prompt 0 has ids from 1 to 272, and the model's vocab_size is 272"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"n": 0}, "n=0"),
        ({"seeds": [1]}, "1 seeds for 4 prompts with n=1"),
        ({"stop_texts": ["."]}, "need a tokenizer"),
    ],
)
def test_mistakes(model, change, message):
    arguments = {"prompts": PROMPTS, "max_new_tokens": 2} | change
    with pytest.raises(ValueError, match=message):
        complete(model, arguments.pop("prompts"), GREEDY, **arguments)


@pytest.mark.parametrize("penalty", [1e-6, 1e6])
def test_the_largest_settings_are_not_taken_for_broken_weights(model, penalty):
    sampling = Sampling(temperature=1e6, repetition_penalty=penalty)
    ((one,),) = complete(model, [[5, 7]], sampling, max_new_tokens=20, vocab_size=100, seeds=[0])
    assert len(one.ids) == 20


def test_broken_weights_are_said_and_positions_beyond_the_model_warned_of(model, caplog):
    complete(model, [[1, 2]], max_new_tokens=255)
    assert "max_position_embeddings" in caplog.text
    broken = GptOss(model.config)
    initialize(broken, seed=0)
    broken.lm_head.weight.data.fill_(math.nan)
    for sampling in (GREEDY, Sampling()):
        with pytest.raises(ValueError, match="logits are nan"):
            complete(broken, [[1, 2]], sampling, max_new_tokens=2)
    others = iter([1, 2**31])  # another rank's passes before the first token, and its logits are nan
    with pytest.raises(ValueError, match="logits are nan"):
        complete(model, [[1, 2]], max_new_tokens=2, largest=lambda number: next(others))
    assert complete(model, [], max_new_tokens=2) == []
