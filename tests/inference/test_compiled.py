"""A compiled decoding step against the model as it is."""

import pytest
import torch

from gptoss_dist.inference import KVCache
from gptoss_dist.inference.compiled import CompiledDecoding
from gptoss_dist.model.generate import generate
from tests.support.decoders import WINDOW, small_decoder


@pytest.mark.compiled
def test_one_compilation_serves_all_positions():
    """Before the window, across its border and far behind it, and a second text with the same capacity."""
    model = small_decoder(2)
    compiled = CompiledDecoding(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for prompt, new in ((WINDOW - 3, 3 * WINDOW), (3 * WINDOW, 5)):
        ids = torch.randint(0, 97, (3, prompt), generator=torch.Generator().manual_seed(prompt))
        expected = generate(model, ids, max_new_tokens=new, temperature=0)
        assert torch.equal(generate(compiled, ids, max_new_tokens=new, temperature=0), expected)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("padding", [None, (0, 4, 2)])
@torch.no_grad()
def test_a_cache_of_fixed_shapes_is_a_cache(padding):
    """What is compiled, step by step and uncompiled: the masks hide what was never written, and padding."""
    model, logits = small_decoder(2), []
    ids = torch.randint(0, 97, (3, 4 * WINDOW), generator=torch.Generator().manual_seed(0))
    for fixed_shapes in (False, True):
        cache = KVCache(model.config, capacity=64, padding=padding, fixed_shapes=fixed_shapes)
        parts = [ids[:, :5], *ids[:, 5:].split(1, dim=1)]
        logits.append(torch.cat([model(part, cache=cache, last_only=True) for part in parts], dim=1))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
