"""The choice of experts, forced from outside the router for benchmarks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from gptoss_dist import GptOss, ModelConfig
from gptoss_dist.model.init import initialize
from gptoss_dist.model.moe import MoE, Router
from gptoss_dist.parallel.forced_routing import ForcedRouting, force_routing
from tests.support.sizes import SMALL as SIZES

E, D = SIZES["num_local_experts"], SIZES["hidden_size"]


def random_router(**fields) -> Router:
    router = Router(ModelConfig(**(SIZES | fields)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(generator=generator)
    return router


def tokens(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("T", [1, 2, 3, 31, 33])
@pytest.mark.parametrize("experts, k", [(6, 2), (6, 6), (5, 3), (8, 1)])
def test_balanced_routing(T, experts, k):
    router, x = random_router(num_local_experts=experts, num_experts_per_tok=k), tokens(T)
    ForcedRouting(router, "balanced")
    weights, indices, stats = router(x)
    assert indices.dtype == torch.int64
    assert indices.tolist() == [[(t * k + i) % experts for i in range(k)] for t in range(T)]
    assert all(len(set(row)) == k for row in indices.tolist())
    assert stats.counts_E.max() - stats.counts_E.min() == (0 if T * k % experts == 0 else 1)
    assert torch.equal(stats.counts_E, torch.bincount(indices.flatten(), minlength=experts).float())
    logits = F.linear(x, router.weight, router.bias)
    torch.testing.assert_close(weights, torch.softmax(logits.gather(1, indices), dim=-1))


def test_balanced_routing_trains_the_router():
    moe = MoE(ModelConfig(**SIZES))
    for name, parameter in moe.named_parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    ForcedRouting(moe.router, "balanced")
    moe(tokens(12)[None])[0].square().sum().backward()
    assert all((row != 0).any() for row in moe.router.weight.grad)  # every expert is used


def test_replay_keeps_the_first_choice_until_the_number_of_tokens_changes():
    router = random_router(router_selection_bias=True)
    router.selection_bias.copy_(torch.linspace(-1, 1, E))
    free = copy.deepcopy(router)
    ForcedRouting(router, "replay")
    first = router(tokens(9, seed=1))[1]
    assert torch.equal(first, free(tokens(9, seed=1))[1])
    assert first.dtype == torch.int64 and not first.requires_grad

    other = tokens(9, seed=2)
    assert not torch.equal(free(other)[1], first)
    weights, indices, stats = router(other)
    assert torch.equal(indices, first)
    assert torch.equal(stats.counts_E, torch.bincount(first.flatten(), minlength=E).float())
    logits = F.linear(other, router.weight, router.bias)
    torch.testing.assert_close(weights, torch.softmax(logits.gather(1, first), dim=-1))

    shorter = router(tokens(5, seed=3))[1]
    assert torch.equal(shorter, free(tokens(5, seed=3))[1])
    assert torch.equal(router(tokens(5, seed=4))[1], shorter)
    assert torch.equal(router(other)[1], free(other)[1])  # the record of 9 tokens is gone


@pytest.mark.parametrize("compiled", [False, True])
def test_replay_under_recomputation_and_compilation(compiled):
    """Recomputed blocks see the experts of their forward pass, in the step that records them and in later ones."""
    model = GptOss(ModelConfig(**SIZES))
    initialize(model, seed=0)
    twin = copy.deepcopy(model)
    forced, others = force_routing(model, "replay"), force_routing(twin, "replay")
    for layer in model.model.layers:
        layer.forward = _recomputed(layer.forward)
        if compiled:
            layer.compile(backend="eager")
    for step in range(3):
        ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(step))
        for net in (model, twin):
            net.zero_grad()
            loss, auxiliary = net.loss(ids, ids)
            (loss + auxiliary["aux"]).backward()
        for ours, other in zip(forced, others, strict=True):
            assert torch.equal(ours.recorded_TK, other.recorded_TK)
            assert torch.equal(ours.router.weight.grad, other.router.weight.grad)


def _recomputed(forward):
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


def test_once_recorded_replay_compiles_without_graph_breaks():
    router = random_router()
    ForcedRouting(router, "replay")
    first = router(tokens(7, seed=1))[1]
    compiled = torch.compile(router, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tokens(7, seed=2))[1], first)


@pytest.mark.parametrize("forced", ["balanced", "replay"])
def test_evaluation_ignores_forcing(forced):
    router, x = random_router(), tokens(9)
    expected = copy.deepcopy(router).eval()(x)
    ForcedRouting(router, forced)
    router(tokens(9, seed=5))
    router.eval()
    weights, indices, _ = router(x)
    assert torch.equal(weights, expected[0]) and torch.equal(indices, expected[1])


def test_an_unknown_way_of_forcing_is_refused():
    with pytest.raises(ValueError, match="'balance'; choose balanced or replay"):
        ForcedRouting(random_router(), "balance")


def test_balanced_routing_compiles_without_graph_breaks():
    router, x = random_router(), tokens(7)
    ForcedRouting(router, "balanced")
    expected = router(x)
    weights, indices, _ = torch.compile(router, fullgraph=True, backend="eager")(x)
    assert torch.equal(weights, expected[0]) and torch.equal(indices, expected[1])


def test_a_copy_of_a_model_has_its_own_forced_routing():
    """Neither the record nor the router of the copy is that of the original."""
    router = random_router()
    forced = ForcedRouting(router, "replay")
    twin = copy.deepcopy(router)
    first = router(tokens(9, seed=1))[1]
    assert twin.choose.router is twin and twin.choose.is_recording and not forced.is_recording
    assert not torch.equal(twin(tokens(9, seed=2))[1], first)
