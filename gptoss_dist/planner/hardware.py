"""Peak FLOP/s of the device that a run uses."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

from gptoss_dist.ops import gemm


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


@dataclass(frozen=True)
class _Accelerator:
    """Dense TFLOP/s with fp32 accumulation.

    Vendors print twice these where they assume 2:4 sparsity.
    """

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
    """Return the dense matmul peak of one device for operands of `dtype`.

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
    """Return the best rate of square matrix products within the time budget.

    On a busy machine a long product is interrupted, and its rate is no peak; of many short ones some are not. A larger
    size runs only if the rate so far says that it fits: a dtype that the CPU emulates must not stall the start.
    """
    best, started = 0.0, time.perf_counter()
    for part, size in enumerate((256, 512, 1024, 2048), 1):
        until = started + budget_s * part / 4
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
    return Peak(best, label, "best of many products of square matrices")
