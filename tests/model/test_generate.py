"""Generation with the cache against recomputing everything, and sampling against its definition."""

import copy

import pytest
import torch

from gptoss_dist import GptOss
from gptoss_dist.inference import KVCache, sample
from gptoss_dist.model.generate import generate
from tests.support.decoders import WINDOW, small_decoder


@pytest.fixture(scope="module")
def model() -> GptOss:
    return small_decoder(4)


def recomputed(model: GptOss, ids, steps: int):
    for _ in range(steps):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("prompt", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 2])
@torch.no_grad()
def test_greedy_equals_recomputation_past_the_window(model, prompt):
    ids = torch.randint(0, 97, (3, prompt), generator=torch.Generator().manual_seed(prompt))
    expected = recomputed(model, ids, 3 * WINDOW)
    assert len(set(expected[0, prompt:].tolist())) > 3  # not one token for ever
    assert torch.equal(generate(model, ids, max_new_tokens=3 * WINDOW, temperature=0), expected)


@torch.no_grad()
def test_cached_logits_for_any_split_into_chunks(model):
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    whole = model(ids)
    for chunks in ([40], [1] * 40, [20, 20], [5, 1, 13, 1, 20], [3, 37]):
        cache = KVCache(model.config)
        parts = [model(part, cache=cache) for part in ids.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
        assert cache.length == 40


@torch.no_grad()
def test_sliding_layers_hold_only_the_window(model):
    cache = KVCache(model.config)
    model(torch.zeros(1, 100, dtype=torch.long), cache=cache)
    row = 2 * 2 * 8 * 4  # k and v, 2 heads of 8 values of 4 bytes
    sliding, full = cache.layers[0], cache.layers[1]
    assert sliding.nbytes() == WINDOW * row
    assert 100 * row <= full.nbytes() <= 200 * row
    assert cache.nbytes() == sum(layer.nbytes() for layer in cache.layers)


@pytest.mark.parametrize("temperature", [1e-40, 1e-300])
def test_a_temperature_near_zero_takes_the_likeliest(temperature):
    logits = torch.tensor([[1.0, 3e4, 2.9e4, -torch.inf], [5.0, -3e4, 4.999, 0.0]])
    assert sample(logits, temperature, top_k=2, top_p=0.9).tolist() == [1, 0]


def test_sampling_rules():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]]))
    draw = lambda **kw: {  # noqa: E731
        int(sample(logits, 1.0, generator=torch.Generator().manual_seed(s), **kw)) for s in range(200)
    }
    assert draw() == {0, 1, 2, 3}
    assert draw(top_k=2) == {0, 1}
    assert draw(top_p=0.5) == {0}
    assert draw(top_p=0.51) == {0, 1}
    assert draw(top_k=3, top_p=0.95) == {0, 1, 2}
    assert int(sample(logits, 0.0)) == 0
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits.expand(20000, 4), 1.0, generator=generator).bincount(minlength=4) / 20000
    torch.testing.assert_close(drawn, logits.exp()[0], atol=0.02, rtol=0)


def test_end_of_text_and_vocabulary_limit(model):
    ids = torch.randint(0, 97, (2, 4), generator=torch.Generator().manual_seed(1))
    free = generate(model, ids, max_new_tokens=12, temperature=0)
    eos = int(free[0, 6])
    stopped = generate(model, ids, max_new_tokens=12, temperature=0, eos_id=eos)
    assert (stopped[0, 6:] == eos).all()
    limited = generate(model, ids, max_new_tokens=30, temperature=2.0, vocab_size=5)
    assert (limited[:, 4:] < 5).all()
    with pytest.raises(ValueError, match="at least one"):
        generate(model, ids[:, :0], max_new_tokens=1)
    with pytest.raises(ValueError, match="top_p"):
        generate(model, ids, max_new_tokens=1, top_p=0.0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_nan_is_refused_at_any_temperature(model, temperature):
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[:5] = torch.nan
    ids = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="logits are nan"):
        generate(broken, ids, max_new_tokens=2, temperature=temperature)
