"""Where documents lie is found once for a forward pass, and what is compiled or recomputed gets it handed down."""

import torch
from torch.utils.checkpoint import checkpoint

from gptoss_dist import GptOss, ModelConfig
from gptoss_dist.model import transformer
from gptoss_dist.model.init import initialize
from tests.support.sizes import SMALL

CONFIG = ModelConfig(**SMALL | {"num_local_experts": 4, "sliding_window": 8, "initializer_range": 0.3})


def ids_of(borders: list[int], T: int = 30) -> torch.Tensor:
    return (torch.arange(T) >= torch.tensor(borders)[:, None]).sum(0)[None]


def recomputed(forward):
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


def test_they_are_located_once_also_under_recomputation(monkeypatch):
    calls = []
    locate = transformer.locate_documents
    monkeypatch.setattr(transformer, "locate_documents", lambda ids: calls.append(ids) or locate(ids))
    model = GptOss(CONFIG)
    initialize(model, seed=0)
    tokens = torch.randint(0, 50, (1, 30), generator=torch.Generator().manual_seed(0))
    ids, gradients = ids_of([7, 20]), []
    for forwards in ([layer.forward for layer in model.model.layers], None):
        for layer, forward in zip(model.model.layers, forwards or ()):
            layer.forward = recomputed(forward)
        model.zero_grad()
        model.loss(tokens, tokens, document_ids_BT=ids)[0].backward()
        gradients.append(model.lm_head.weight.grad.clone())
    assert len(calls) == 2 and torch.equal(*gradients)


def test_compiled_blocks_neither_break_nor_compile_again_for_every_batch():
    """The longest document is a number on the host, and the number of documents a size: both change every time."""
    model = GptOss(CONFIG)
    initialize(model, seed=0)
    block = model.model.layers[0].self_attn
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    x_BTD = torch.randn(1, 30, 16, generator=torch.Generator().manual_seed(0))
    rotary = model.model.rotary_tables(torch.arange(30), torch.float32)[CONFIG.layer_types[0]]
    torch._dynamo.utils.counters.clear()
    graphs = []
    for borders in ([7, 20], [5, 9, 21], [15], [3, 4, 11, 12, 29]):
        documents = transformer.locate_documents(ids_of(borders))
        torch.testing.assert_close(compiled(x_BTD, rotary, documents), block(x_BTD, rotary, documents))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == 1 and graphs[1] == graphs[-1] <= 2
