"""The router's choice of experts: plain, and with a selection bias."""

import copy

import pytest
import torch
import torch.nn.functional as F

from gptoss_dist import GptOss, ModelConfig
from gptoss_dist.model.init import initialize
from gptoss_dist.model.losses import updated_selection_bias
from gptoss_dist.model.moe import Router, router_stats
from tests.support.sizes import SMALL as SIZES

E, K, D = SIZES["num_local_experts"], SIZES["num_experts_per_tok"], SIZES["hidden_size"]


def random_router(seed: int = 0, **fields) -> Router:
    router = Router(ModelConfig(**(SIZES | fields)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(generator=generator)
    return router


def tokens(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def router_of(logits_TE: list[list[float]], **fields) -> tuple[Router, torch.Tensor]:
    """A router and inputs that give these logits: the weight picks the first E dimensions."""
    router = Router(ModelConfig(**SIZES, router_bias=False, **fields))
    with torch.no_grad():
        router.weight.copy_(torch.eye(E, D))
    return router, F.pad(torch.tensor(logits_TE), (0, D - E))


def load_cv(counts_E: torch.Tensor) -> float:
    return float(counts_E.std(correction=0) / counts_E.mean())


# --- Plain -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_options_the_router_is_topk_and_softmax_to_the_bit(dtype):
    router, x = random_router().to(dtype), tokens(33).to(dtype)
    twin = copy.deepcopy(router)
    weights, indices, stats = router(x)
    logits = F.linear(x, twin.weight, twin.bias)
    top, expected = torch.topk(logits, K, dim=-1)
    expected_weights = torch.softmax(top, dim=-1, dtype=torch.float32).to(dtype)
    assert torch.equal(indices, expected) and torch.equal(weights, expected_weights)
    direction = torch.randn(weights.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    ((weights * direction).sum() + stats.z).backward()
    ((expected_weights * direction).sum() + router_stats(logits, expected).z).backward()
    assert torch.equal(router.weight.grad, twin.weight.grad) and torch.equal(router.bias.grad, twin.bias.grad)


@pytest.mark.parametrize("biased", [False, True])
def test_choices_compile_without_graph_breaks(biased):
    router, x = random_router(router_selection_bias=biased), tokens(7)
    expected = router(x)
    weights, indices, stats = torch.compile(router, fullgraph=True, backend="eager")(x)
    assert torch.equal(weights, expected[0]) and torch.equal(indices, expected[1])
    assert torch.equal(stats.counts_E, expected[2].counts_E)


# --- Selection bias --------------------------------------------------------------------------------------------------


def test_selection_bias_changes_the_choice_and_not_the_weights():
    logits = [[3.0, 2.0, 1.0, 0.0, -1.0, -2.0], [0.0, 5.0, 4.5, 4.0, 0.0, 0.0], [-9.0, 1.0, 0.5, 0.0, -1.0, -9.0]]
    bias = [-2.5, 0.0, 0.0, 1.5, 0.0, 0.0]
    router, x = router_of(logits, router_selection_bias=True)
    router.selection_bias.copy_(torch.tensor(bias))
    weights, indices, stats = router(x)
    assert indices.tolist() == [[1, 3], [3, 1], [3, 1]]  # without the bias: [[0, 1], [1, 2], [1, 2]]
    for t in range(len(logits)):
        biased = [logits[t][e] + bias[e] for e in range(E)]
        chosen = sorted(range(E), key=lambda e: -biased[e])[:K]
        assert indices[t].tolist() == chosen
        exponentials = torch.tensor([logits[t][e] for e in chosen], dtype=torch.float64).exp()
        torch.testing.assert_close(weights[t].double(), exponentials / exponentials.sum())
    assert stats.counts_E.tolist() == [0, 3, 0, 3, 0, 0]
    # sums that losses are made of know nothing of the bias
    torch.testing.assert_close(stats.probability_E, torch.tensor(logits).softmax(-1).sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_selection_bias_of_zero_is_none(dtype):
    plain, biased, x = random_router(), random_router(router_selection_bias=True), tokens(33).to(dtype)
    for parameter in (*plain.parameters(), *biased.parameters()):
        parameter.data = parameter.data.to(dtype)  # as under mixed precision: the bias stays float32
    assert biased.selection_bias.dtype == torch.float32
    results = []
    for router in (plain, biased):
        weights, indices, stats = router(x)
        ((weights * torch.arange(K, device=x.device)).sum() + stats.probability_E[0]).backward()
        results.append((weights, indices, *stats, router.weight.grad, router.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_the_state_dict_holds_the_bias_only_where_there_is_one():
    names = {f"model.layers.{i}.mlp.router.selection_bias" for i in range(SIZES["num_hidden_layers"])}
    plain, biased = GptOss(ModelConfig(**SIZES)), GptOss(ModelConfig(**SIZES, router_selection_bias=True))
    assert set(biased.state_dict()) - set(plain.state_dict()) == names
    assert set(biased.state_dict()) >= set(plain.state_dict())
    assert not any("selection_bias" in name for name, _ in biased.named_parameters())
    with pytest.raises(RuntimeError, match="selection_bias"):
        plain.load_state_dict(biased.state_dict())


def test_a_model_from_the_meta_device_starts_without_bias():
    with torch.device("meta"):
        model = GptOss(ModelConfig(**SIZES, router_selection_bias=True))
    model.to_empty(device="cpu")
    for layer in model.model.layers:
        layer.mlp.router.selection_bias.fill_(torch.nan)  # memory may hold anything
    initialize(model, seed=0)
    for layer in model.model.layers:
        bias = layer.mlp.router.selection_bias
        assert bias.dtype == torch.float32 and bias.tolist() == [0.0] * E


def test_bias_goes_up_for_underloaded_experts_and_down_for_overloaded():
    bias = torch.tensor([[0.5, 0.0, -0.5], [1.0, 1.0, 1.0]])
    counts = torch.tensor([[9.0, 3.0, 0.0], [4.0, 4.0, 4.0]])
    expected = torch.tensor([[0.4, 0.1, -0.4], [1.0, 1.0, 1.0]])
    before = bias.clone()
    torch.testing.assert_close(updated_selection_bias(bias, counts, 0.1), expected)
    torch.testing.assert_close(updated_selection_bias(bias[0], counts[0].long(), torch.tensor(0.1)), expected[0])
    assert torch.equal(updated_selection_bias(bias, counts, torch.zeros(())), bias)
    assert updated_selection_bias(bias.bfloat16(), counts, 0.1).dtype == torch.float32
    assert torch.equal(bias, before)


def test_repeated_updates_even_out_a_skewed_router():
    """200 updates bring the load's coefficient of variation to less than a tenth, and the weights stay unbiased."""
    router = random_router(router_selection_bias=True)
    with torch.no_grad():
        router.weight.mul_(0.25)
        router.bias.copy_(torch.linspace(-1.5, 1.5, E))
    cv = []
    for step in range(200):
        _, _, stats = router(tokens(2048, seed=step))
        cv.append(load_cv(stats.counts_E))
        router.selection_bias.copy_(updated_selection_bias(router.selection_bias, stats.counts_E, 0.02))
    assert cv[0] > 0.5
    assert sum(cv[-20:]) / 20 < 0.1 * cv[0]
    assert (router.selection_bias.diff() < 0).all()  # it undoes the skew
