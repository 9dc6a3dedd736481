"""Prefill in chunks and decoding, of prompts of different lengths, against recomputing everything."""

import copy
import functools

import pytest
import torch

from gptoss_dist import GptOss, ModelConfig
from gptoss_dist.model import kv_cache
from gptoss_dist.model.init import initialize
from gptoss_dist.model.kv_cache import KVCache

WINDOW, VOCAB = 24, 97
PROMPTS = (3, 2 * WINDOW + 5, WINDOW)
"""Lengths in a batch."""
NEW = 3 * WINDOW
EXACT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": WINDOW,
    "initializer_range": 0.3,
}
VARIANT = EXACT | {
    "num_shared_experts": 1,
    "rope_pruned_fraction": 0.25,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "router_bias": False,
    "expert_bias": False,
    "expert_activation": "silu",
    "sink_init": "zero",
    "sink_clamp": [-10.0, 15.0],
    "initializer_range": 0.2,
}
"""What is special about gptoss_502m."""


def build(values: dict) -> GptOss:
    model = GptOss(ModelConfig(**values))
    initialize(model, seed=0)
    return model.eval()


@pytest.fixture(scope="module", params=["exact", "variant"])
def values(request) -> dict:
    return EXACT if request.param == "exact" else VARIANT


@pytest.fixture(scope="module")
def model(values) -> GptOss:
    return build(values)


def texts(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n + NEW,), generator=generator) for n in PROMPTS]


def cached(model: GptOss, rows: list[torch.Tensor], chunk: int, **options) -> list[torch.Tensor]:
    """Logits at all positions of each row: prompts in chunks, then one token at a time."""
    longest = max(PROMPTS)
    padding = [longest - n for n in PROMPTS]
    ids = torch.stack([torch.cat((torch.zeros(p, dtype=torch.long), row)) for p, row in zip(padding, rows)])
    cache = KVCache(model.config, padding=padding, **options)
    parts = [*ids[:, :longest].split(chunk, dim=1), *ids[:, longest:].split(1, dim=1)]
    logits = torch.cat([model(part, cache=cache) for part in parts], dim=1)
    assert cache.length == ids.shape[1]
    return [row[p:] for row, p in zip(logits, padding)]


@pytest.mark.parametrize("few", [0, kv_cache.FEW_SCORES], ids=["tiles", "masks"])
@pytest.mark.parametrize("chunk", [1, 7, 128, 1000])
@torch.no_grad()
def test_a_batch_of_prompts_equals_recomputing_each_by_itself(model, chunk, few, monkeypatch):
    monkeypatch.setattr(kv_cache, "FEW_SCORES", few)
    rows = texts()
    for row, logits in zip(rows, cached(model, rows, chunk, capacity=max(PROMPTS) + NEW)):
        torch.testing.assert_close(logits, model(row[None])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 128])
@torch.no_grad()
def test_shapes_that_never_change_give_the_same(model, chunk):
    rows = texts()
    for row, logits in zip(rows, cached(model, rows, chunk, capacity=200, fixed_shapes=True)):
        torch.testing.assert_close(logits, model(row[None])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", [(0, 0), (0, 9)], ids=["equal", "unequal"])
@torch.no_grad()
def test_attention_of_fixed_shapes_is_one_graph_for_each_kind_of_layer(model, padding):
    """Captured whole, and never again: which a compiler, or a CUDA graph, needs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    T, decoder = 60, model.model
    rows = [torch.randint(0, VOCAB, (T - pad,), generator=torch.Generator().manual_seed(pad)) for pad in padding]
    ids = torch.stack([torch.cat((torch.zeros(pad, dtype=torch.long), row)) for pad, row in zip(padding, rows)])
    cache = KVCache(model.config, capacity=T, padding=padding, fixed_shapes=True)
    model(ids[:, :10], cache=cache)
    compile_ = functools.partial(torch.compile, backend="eager", fullgraph=True, dynamic=False)
    attentions = [compile_(block.self_attn) for block in model.blocks]
    for column in range(10, T):
        token_B1 = ids[:, column : column + 1]
        position, steps = cache.advance(token_B1)
        x = decoder.embed_tokens(token_B1)
        rotary = decoder.rotary_tables(position, x.dtype)
        for block, attention, kind, step in zip(model.blocks, attentions, decoder.layer_types, steps):
            x = x + attention(block.input_layernorm(x), rotary[kind], None, step)
            x = x + block.mlp(block.post_attention_layernorm(x))[0]
    logits = model.lm_head(decoder.norm(x))[:, 0]
    for row, found in zip(rows, logits):
        torch.testing.assert_close(found, model(row[None])[0, -1], rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("few", [0, kv_cache.FEW_SCORES], ids=["tiles", "masks"])
@pytest.mark.parametrize("chunk", [1, 7, 128, 1000])
@torch.no_grad()
def test_bf16_is_as_near_to_the_truth_as_recomputing_is(values, chunk, few, monkeypatch):
    """Every expert is chosen: a rounding could change a choice, and then nothing could be compared."""
    monkeypatch.setattr(kv_cache, "FEW_SCORES", few)
    rounded = build(values | {"num_experts_per_tok": values["num_local_experts"]}).bfloat16()
    exact = copy.deepcopy(rounded).float()
    rows = texts()
    for row, logits in zip(rows, cached(rounded, rows, chunk)):
        truth = exact(row[None])[0]
        both = torch.stack([logits.float(), rounded(row[None])[0].float()])
        error, recomputed = (both - truth).abs().mean(dim=(1, 2)) / truth.abs().mean()
        assert 0 < recomputed < 0.05 and error < 1.3 * recomputed, (error, recomputed)


@torch.no_grad()
def test_rows_can_be_copied_and_dropped(model):
    """As for several samples of a prompt, and when some are finished."""
    rows = texts()
    padding = [max(PROMPTS) - n for n in PROMPTS]
    ids = torch.stack([torch.cat((torch.zeros(p, dtype=torch.long), row)) for p, row in zip(padding, rows)])
    cache = KVCache(model.config, padding=padding)
    model(ids[:, : max(PROMPTS)], cache=cache)
    chosen = [2, 0, 0]
    cache.select(chosen)
    for column in range(max(PROMPTS), max(PROMPTS) + 5):
        logits = model(ids[chosen, column : column + 1], cache=cache)[:, 0]
    for row, found in zip(chosen, logits):
        expected = model(rows[row][None, : PROMPTS[row] + 5])[0, -1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bytes_are_those_of_the_buffers(model):
    row = 2 * 2 * 8 * 4  # k and v, 2 heads of 8 values of 4 bytes
    for tokens in (1, WINDOW, 100):
        cache = KVCache(model.config, capacity=100)
        model(torch.zeros(3, tokens, dtype=torch.long), cache=cache)
        assert cache.nbytes() == 3 * (WINDOW + 100) * row
        storages = {b.untyped_storage().data_ptr(): b.untyped_storage() for la in cache.layers for b in la.buffers}
        assert sum(s.nbytes() for s in storages.values()) == cache.nbytes()
    allocated = KVCache(model.config, capacity=100)
    allocated.allocate(3, torch.float32, torch.device("cpu"))
    assert allocated.nbytes() == cache.nbytes()


def test_what_cannot_be_is_refused(model):
    ids = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="no gradient"):
        model(ids, cache=KVCache(model.config))
    with torch.no_grad():
        with pytest.raises(ValueError, match="capacity=4"):
            model(ids, cache=KVCache(model.config, capacity=4))
        with pytest.raises(ValueError, match="1 rows do not fit into a cache of 2"):
            model(ids, cache=KVCache(model.config, padding=[0, 1]))
        with pytest.raises(ValueError, match="document_ids_BT"):
            model(ids, cache=KVCache(model.config), document_ids_BT=ids)
    with pytest.raises(ValueError, match="needs a capacity"):
        KVCache(model.config, fixed_shapes=True)
    with pytest.raises(ValueError, match="capacity=0"):
        KVCache(model.config, capacity=0)
