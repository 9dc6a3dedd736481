"""Model FLOPs of a GPT-OSS style network, peak rates of devices, and the MFU that follows from both.

Convention, named wherever a utilisation is printed (`MFU_CONVENTION`): *model FLOPs*. Only matrix products count, two
FLOPs per multiply-add; the backward pass costs twice the forward; recomputation under activation checkpointing, masked
query-key pairs, norms, softmax, biases and the optimizer count nothing (PaLM, arXiv:2204.02311, appendix B, but with
the exact number of visible pairs instead of `12 L H Q T`).
"""

from __future__ import annotations

import dataclasses
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gptoss_dist.ops import gemm

if TYPE_CHECKING:
    from gptoss_dist.model.config import ModelConfig

MFU_CONVENTION = "model FLOPs: 3 x forward matmuls, exact visible attention pairs, no recomputation"
BACKWARD_OVER_FORWARD = 2


@dataclass(frozen=True)
class FlopCount:
    """Forward matmul FLOPs per token, averaged over one sequence and summed over layers."""

    attention_projections: float
    attention_scores: float
    """Query-key and probability-value products over visible pairs only."""
    router: float
    experts: float
    """The `num_experts_per_tok` routed experts that a token really passes."""
    shared_experts: float
    head: float

    @property
    def forward(self) -> float:
        """FLOPs per token of one forward pass."""
        return sum(dataclasses.astuple(self))

    @property
    def training(self) -> float:
        """FLOPs per token of one forward and one backward pass."""
        return self.forward * (1 + BACKWARD_OVER_FORWARD)

    def step(self, tokens: int) -> float:
        """FLOPs of a training step over `tokens` tokens, all ranks and micro-batches together."""
        return self.training * tokens

    def shares(self) -> dict[str, float]:
        """Fraction of the total for each part; the fractions add up to 1."""
        return {name: value / self.forward for name, value in dataclasses.asdict(self).items()}

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.shares().items() if share)
        return f"{self.training / 1e9:.4g} GFLOP/token to train ({shares}; {MFU_CONVENTION})"


def visible_pairs(seq_len: int, window: int | None = None) -> int:
    """Query-key pairs that a causal mask leaves visible in one sequence.

    Args:
        seq_len: tokens in the sequence.
        window: keys visible to a query on a sliding layer, counting its own; None for full causal attention.
    """
    window = seq_len if window is None else min(window, seq_len)
    # The first `window` queries see 1, 2, ..., window keys; every later one sees `window`.
    return window * (window + 1) // 2 + (seq_len - window) * window


def flops_per_token(config: ModelConfig, seq_len: int) -> FlopCount:
    """Count the matrix products of the model at sequence length `seq_len`.

    Args:
        config: a `ModelConfig` or `transformers.GptOssConfig` (shared experts are read where the config has them).
        seq_len: tokens per sequence, each attending over its own sequence without document boundaries.

    Raises:
        ValueError: `seq_len` is not positive.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} must be at least 1")
    hidden = config.hidden_size
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    layers = config.num_hidden_layers

    pairs = sum(
        visible_pairs(seq_len, config.sliding_window if layer_type == "sliding_attention" else None)
        for layer_type in config.layer_types
    )
    return FlopCount(
        attention_projections=2 * layers * hidden * (2 * q_width + 2 * kv_width),
        attention_scores=4 * q_width * pairs / seq_len,
        router=2 * layers * hidden * config.num_local_experts,
        experts=2 * layers * config.num_experts_per_tok * 3 * hidden * config.intermediate_size,
        shared_experts=2 * layers * config.num_shared_experts * 3 * hidden * config.intermediate_size,
        head=2 * hidden * config.vocab_size,
    )


@dataclass(frozen=True)
class Peak:
    """The rate that a utilisation is measured against."""

    value: float
    """FLOP/s of one device, dense."""
    label: str
    """What the rate is, to be printed beside the utilisation."""
    source: str
    """The document it was taken from, or how it was measured."""

    def __str__(self) -> str:
        return f"{self.value / 1e12:.4g} TFLOP/s ({self.label}; {self.source})"


def mfu(flops: FlopCount, tokens_per_s_per_device: float, peak: Peak) -> float:
    """Model FLOPs utilisation as a fraction of `peak`, by `MFU_CONVENTION`."""
    return flops.training * tokens_per_s_per_device / peak.value


@dataclass(frozen=True)
class _Accelerator:
    """Dense TFLOP/s with fp32 accumulation. Vendors print twice these where they assume 2:4 sparsity."""

    pattern: str
    """Whole words of the name that the driver reports."""
    bf16: float
    tf32: float
    fp32: float
    source: str


# The first match wins, so a variant stands before the family's plain name.
_ACCELERATORS = (
    _Accelerator(r"GB200", 2500, 1250, 90, "NVIDIA Blackwell architecture technical brief, GB200, half of sparse"),
    _Accelerator(r"B200", 2250, 1100, 80, "NVIDIA Blackwell architecture technical brief, HGX B200, half of sparse"),
    _Accelerator(r"H200 NVL", 835.5, 417.5, 60, "NVIDIA H200 datasheet, NVL column, half of sparse"),
    _Accelerator(r"H200", 989.5, 494.5, 67, "NVIDIA H200 datasheet, SXM column, half of sparse"),
    _Accelerator(r"H100 NVL", 835.5, 417.5, 60, "NVIDIA H100 datasheet, NVL column, half of sparse"),
    _Accelerator(r"H100 PCIe", 756, 378, 51, "NVIDIA H100 datasheet, PCIe column, half of sparse"),
    _Accelerator(r"H100", 989.5, 494.5, 67, "NVIDIA H100 datasheet, SXM column, half of sparse"),
    _Accelerator(r"H20", 148, 74, 44, "NVIDIA H20 product brief"),
    _Accelerator(r"A100", 312, 156, 19.5, "NVIDIA A100 datasheet"),
    _Accelerator(r"L40S", 362.05, 183, 91.6, "NVIDIA L40S datasheet"),
    _Accelerator(r"A10", 125, 62.5, 31.2, "NVIDIA A10 datasheet"),
    _Accelerator(r"RTX 4090(?! (?:D|Laptop))", 165.2, 82.6, 82.6, "NVIDIA Ada GPU architecture whitepaper, appendix A"),
    _Accelerator(r"MI300X", 1307.4, 653.7, 163.4, "AMD Instinct MI300X datasheet"),
)


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> Peak | None:
    """The dense matmul peak of one device for operands of `dtype`.

    A CUDA or ROCm device is looked up in a table of vendor figures; fp32 is TF32 where torch is set to use it. A CPU
    has no figure worth quoting, so its matmul rate is measured (about 0.3 s, at the current number of threads). If it
    has no instructions for bf16, bf16 is measured in float32 too, and the faster way is the peak, named in the label.

    Returns:
        None where the device or dtype is unknown: MFU is then left out, which the caller says once, never guessed.
    """
    device = torch.device(device)
    if device.type == "cpu":
        peaks = [_measured_gemm_peak(dtype)]
        if dtype == torch.bfloat16 and not gemm.CPU_MULTIPLIES_BF16:
            peaks.append(_measured_gemm_peak(torch.float32))
        return max(peaks, key=lambda peak: peak.value)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    tf32 = device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return _datasheet_peak(name, dtype, tf32)


def _datasheet_peak(name: str, dtype: torch.dtype, tf32: bool) -> Peak | None:
    column, label = {
        torch.bfloat16: ("bf16", "bf16"),
        torch.float16: ("bf16", "fp16"),
        torch.float32: ("tf32", "tf32") if tf32 else ("fp32", "fp32"),
    }.get(dtype, (None, None))
    # A MIG slice reports the whole card's name but has a part of its rate.
    if column is not None and not re.search(r"\bMIG\b", name):
        for accelerator in _ACCELERATORS:
            if re.search(rf"\b{accelerator.pattern}\b", name):
                rate = getattr(accelerator, column) * 1e12
                return Peak(rate, f"dense {label} peak of {name}", accelerator.source)
    return None


def _measured_gemm_peak(dtype: torch.dtype, budget_s: float = 0.3) -> Peak:
    """Best rate of square matrix products within the time budget.

    The larger size runs only if the rate so far says that it fits: a dtype that the CPU emulates must not stall the
    start for longer than one product of the smaller.
    """
    best, started = 0.0, time.perf_counter()
    for size, until in ((1024, started + budget_s / 3), (2048, started + budget_s)):
        flops = 2 * size**3
        a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        out = torch.empty_like(a)
        now = time.perf_counter()
        if best and now + 2 * flops / best > until:
            break
        while not best or now < until:
            torch.mm(a, b, out=out)
            before, now = now, time.perf_counter()
            best = max(best, flops / (now - before))
    name, threads = str(dtype).removeprefix("torch."), torch.get_num_threads()
    label = f"measured GEMM peak of this CPU, products in {name}, {threads} threads"
    return Peak(best, label, "measured at start-up, best of several products of square matrices")
