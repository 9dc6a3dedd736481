"""The experts of a decoding step against their slow twin, `Experts.forward` by the reference back end."""

import pytest
import torch

from gptoss_dist import GptOss, ModelConfig
from gptoss_dist.model.init import initialize
from gptoss_dist.model.moe import Experts
from gptoss_dist.ops.experts import few_rows

# fp32: the order of summation. bf16: each result carries a few roundings of 2^-9, at different places.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def experts(dtype, D=17, I=13, E=5, **fields) -> Experts:  # noqa: E741
    """Experts whose pre-activations exceed the limit of 7 now and then, on both sides, for inputs of size 3.5."""
    layer = Experts(
        ModelConfig(hidden_size=D, intermediate_size=I, num_local_experts=E, num_experts_per_tok=1, **fields)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            scale = parameter.shape[1] ** -0.5 if parameter.dim() == 3 else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return layer.to(dtype)


def tokens(T: int, K: int, E: int, D: int, dtype, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, weights, and K different experts for each."""
    generator = torch.Generator().manual_seed(seed)
    indices_TK = torch.rand(T, E, generator=generator).topk(K).indices
    weights_TK = torch.randn(T, K, generator=generator).softmax(-1)
    return (torch.randn(T, D, generator=generator) * 3.5).to(dtype), weights_TK.to(dtype), indices_TK


def both(layer: Experts, monkeypatch, *inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of few rows, which must really have been computed as such, and that of the reference."""
    calls = []
    with monkeypatch.context() as patch, torch.no_grad():
        run = few_rows.experts_of_few_rows
        patch.setattr(few_rows, "experts_of_few_rows", lambda *a, **k: calls.append(1) or run(*a, **k))
        fast = layer(*inputs)
        layer.backend = "loop"
        slow = layer(*inputs)
        layer.backend = "auto"
    assert len(calls) == 1
    return fast, slow


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["gpt_oss", "silu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("T", "K"), [(1, 1), (1, 4), (1, 5), (2, 2), (7, 1), (8, 4), (12, 5)])
def test_matches_the_reference(monkeypatch, T, K, bias, activation, dtype):
    layer = experts(dtype, expert_bias=bias, expert_activation=activation)
    fast, slow = both(layer, monkeypatch, *tokens(T, K, 5, 17, dtype))
    assert fast.dtype == dtype and fast.shape == slow.shape
    error = (fast.double() - slow.double()).norm() / slow.double().norm()
    assert error <= TOLERANCE[dtype], error


def test_bf16_either_way(monkeypatch, bf16_products):
    for D, I, T in ((24, 40, 3), (40, 5, 16)):  # noqa: E741
        fast, slow = both(experts(torch.bfloat16, D, I), monkeypatch, *tokens(T, 2, 5, D, torch.bfloat16))
        assert (fast.double() - slow.double()).norm() <= 2e-2 * slow.double().norm()


def test_all_tokens_to_one_expert_and_none_of_them_contiguous(monkeypatch):
    layer = experts(torch.float32)
    x_TD, weights_TK, _ = tokens(6, 1, 5, 17, torch.float32)
    x_TD = x_TD.t().contiguous().t()
    fast, slow = both(layer, monkeypatch, x_TD, weights_TK, torch.full((6, 1), 3))
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def test_who_is_served():
    layer = experts(torch.float32)
    x_TD, _, indices_TK = tokens(4, 2, 5, 17, torch.float32)
    serves = lambda x, indices: few_rows.serves(x, indices, layer.gate_up_proj)  # noqa: E731
    assert not serves(x_TD, indices_TK)  # whoever trains wants gradients
    with torch.no_grad():
        assert serves(x_TD, indices_TK)
        assert not serves(x_TD.bfloat16(), indices_TK)
        assert not serves(x_TD[:0], indices_TK[:0])
        assert not serves(x_TD.to("meta"), indices_TK)
        T = few_rows.MOST_PAIRS // 2
        assert serves(x_TD, torch.zeros(T, 2)) and not serves(x_TD, torch.zeros(T + 1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_without_gradients_is_the_model(dtype):
    """What only inference does (few rows, no sums of the router, one call per norm) changes no more than rounding."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = GptOss(ModelConfig(**sizes, **heads, initializer_range=0.3, num_shared_experts=1))
    initialize(model, seed=0)
    model = model.to(dtype)
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    slow = model(ids).detach()
    with torch.no_grad():
        fast = model(ids)
    assert (fast.double() - slow.double()).norm() <= TOLERANCE[dtype] * 10 * slow.double().norm()
