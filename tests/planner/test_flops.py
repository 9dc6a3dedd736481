"""FLOPs are checked against the published figure and against what torch really dispatches in a written-out model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gptoss_dist.model.config import ModelConfig
from gptoss_dist.ops import gemm
from gptoss_dist.planner import hardware
from gptoss_dist.planner.flops import MFU_CONVENTION, flops_per_token, mfu, visible_pairs
from gptoss_dist.planner.hardware import Peak, peak_flops


def gptoss_502m() -> ModelConfig:
    return ModelConfig(
        vocab_size=128_000,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=96,
        num_local_experts=8,
        num_experts_per_tok=2,
        num_shared_experts=1,
        intermediate_size=1536,
        tie_word_embeddings=True,
        attention_bias=False,
    )


def test_502m_matches_the_published_count():
    count = flops_per_token(gptoss_502m(), 4096)
    assert count.training == pytest.approx(1.602e9, rel=5e-4)
    shares = count.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["head"] == pytest.approx(0.37, abs=0.005)
    assert shares["experts"] + shares["shared_experts"] == pytest.approx(0.48, abs=0.005)
    assert count.step(131_072) == pytest.approx(131_072 * count.training)
    assert MFU_CONVENTION in str(count)


@pytest.mark.parametrize("seq_len", [1, 2, 5, 8, 33])
@pytest.mark.parametrize("window", [None, 1, 5, 64])
def test_visible_pairs_equal_a_count_over_the_mask(seq_len, window):
    i, j = torch.meshgrid(torch.arange(seq_len), torch.arange(seq_len), indexing="ij")
    mask = (i >= j) & (i - j < (window or seq_len))
    assert visible_pairs(seq_len, window) == int(mask.sum())


@pytest.mark.parametrize("num_shared", [0, 2])
def test_tiny_model_matches_the_flops_torch_dispatches(num_shared):
    """One sequence through explicit matmuls, forward and backward, attention one query at a time over visible keys."""
    c = ModelConfig(
        vocab_size=37,
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        num_local_experts=5,
        num_experts_per_tok=2,
        num_shared_experts=num_shared,
        intermediate_size=10,
        sliding_window=3,
    )
    T, q_width, kv_width = 11, 24, 12

    def weight(*shape):
        return torch.randn(*shape, requires_grad=True)

    def expert(x):
        gate_up = x @ weight(c.hidden_size, 2 * c.intermediate_size)
        return gate_up[:, ::2] * gate_up[:, 1::2] @ weight(c.intermediate_size, c.hidden_size)

    with FlopCounterMode(display=False) as counter:
        # The embedding's output is a leaf too, so the first layer's backward is as complete as the others'.
        x = torch.randn(T, c.hidden_size, requires_grad=True)
        h = x
        for layer_type in c.layer_types:
            q, k, v = (h @ weight(c.hidden_size, width) for width in (q_width, kv_width, kv_width))
            rows = []
            for t in range(T):
                first = max(0, t + 1 - c.sliding_window) if layer_type == "sliding_attention" else 0
                heads = []
                for head in range(c.num_attention_heads):
                    at, kv_at = head * c.head_dim, head // 2 * c.head_dim
                    p = q[t : t + 1, at : at + c.head_dim] @ k[first : t + 1, kv_at : kv_at + c.head_dim].T
                    heads.append(p @ v[first : t + 1, kv_at : kv_at + c.head_dim])
                rows.append(torch.cat(heads, dim=1))
            h = h + torch.cat(rows) @ weight(q_width, c.hidden_size)
            scale = (h @ weight(c.hidden_size, c.num_local_experts)).sum(1, keepdim=True)
            for _ in range(c.num_experts_per_tok + num_shared):
                h = h + scale * expert(h)
        (h @ weight(c.hidden_size, c.vocab_size)).sum().backward()

    count = flops_per_token(c, T)
    assert count.step(T) == pytest.approx(counter.get_total_flops(), rel=1e-12)
    assert count.attention_scores > 0 and (count.shared_experts > 0) == bool(num_shared)


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.5),
        ("NVIDIA H100 PCIe", torch.float16, 756),
        ("NVIDIA H200", torch.bfloat16, 989.5),
        ("NVIDIA H20", torch.bfloat16, 148),
        ("NVIDIA A10", torch.float32, 31.2),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA GB200", torch.bfloat16, 2500),
        ("NVIDIA B200", torch.bfloat16, 2250),
        ("AMD Instinct MI300X", torch.bfloat16, 1307.4),
    ],
)
def test_known_devices(name, dtype, tflops):
    peak = hardware._datasheet_peak(name, dtype, False)
    assert peak.value == pytest.approx(tflops * 1e12)
    assert name in peak.label and peak.source


def test_fp32_says_tf32_when_it_is():
    assert hardware._datasheet_peak("NVIDIA H100 PCIe", torch.float32, True).label.startswith("dense tf32")
    assert hardware._datasheet_peak("NVIDIA H100 PCIe", torch.float32, False).value == 51e12


@pytest.mark.parametrize(
    "name", ["NVIDIA A10G", "NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 D"]
)
def test_near_namesakes_are_unknown_rather_than_guessed(name):
    assert hardware._datasheet_peak(name, torch.bfloat16, False) is None


def test_cpu_peak_is_measured_and_labelled():
    peak = peak_flops("cpu", torch.float32)
    assert "measured GEMM peak of this CPU, products in float32" in peak.label
    assert 1e8 < peak.value < 1e14
    count = flops_per_token(gptoss_502m(), 4096)
    assert mfu(count, 0.5 * peak.value / count.training, peak) == pytest.approx(0.5)


def test_a_cpu_is_measured_once_more_only_if_asked_to(monkeypatch):
    """A run that exceeds the peak asks: something else used the machine when it was measured."""
    known, calls = peak_flops("cpu", torch.float32), []
    higher = Peak(2 * known.value, "higher", "test")
    monkeypatch.setattr(hardware, "_measured_gemm_peak", lambda dtype, threads: calls.append(dtype) or higher)
    assert peak_flops("cpu", torch.float32) == known and not calls
    assert peak_flops("cpu", torch.float32, anew=True) == higher and calls == [torch.float32]


def test_cpu_peak_of_bf16_is_that_of_the_faster_way(monkeypatch):
    rates = {torch.bfloat16: 57.0, torch.float32: 235.0}
    monkeypatch.setattr(hardware, "_measured_gemm_peak", lambda dtype, threads: Peak(rates[dtype], str(dtype), "test"))
    monkeypatch.setattr(gemm, "CPU_MULTIPLIES_BF16", False)
    assert peak_flops("cpu", torch.bfloat16, anew=True) == Peak(235.0, "torch.float32", "test")
    rates[torch.bfloat16] = 400.0
    assert peak_flops("cpu", torch.bfloat16, anew=True).value == 400.0
    rates[torch.bfloat16] = 100.0
    monkeypatch.setattr(gemm, "CPU_MULTIPLIES_BF16", True)  # then float32 is not even measured
    assert peak_flops("cpu", torch.bfloat16, anew=True).value == 100.0
