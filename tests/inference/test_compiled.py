"""A compiled decoding step against the model as it is."""

import pytest
import torch

from gptoss_dist import GptOss, ModelConfig
from gptoss_dist.inference import KVCache
from gptoss_dist.inference.compiled import CompiledDecoding
from gptoss_dist.model.generate import generate
from gptoss_dist.model.init import initialize

WINDOW = 8


def small_model() -> GptOss:
    config = ModelConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        initializer_range=0.3,
    )
    model = GptOss(config)
    initialize(model, seed=0)
    return model.eval()


@pytest.mark.compiled
def test_one_compilation_serves_all_positions():
    """Before the window, across its border and far behind it, and a second text with the same capacity."""
    model = small_model()
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
    model, logits = small_model(), []
    ids = torch.randint(0, 97, (3, 4 * WINDOW), generator=torch.Generator().manual_seed(0))
    for fixed_shapes in (False, True):
        cache = KVCache(model.config, capacity=64, padding=padding, fixed_shapes=fixed_shapes)
        parts = [ids[:, :5], *ids[:, 5:].split(1, dim=1)]
        logits.append(torch.cat([model(part, cache=cache, last_only=True) for part in parts], dim=1))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
