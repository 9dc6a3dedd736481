"""GPUs and networks by name, and the peak FLOP/s of the device that a run uses."""

from __future__ import annotations

import functools
import re
import time
from dataclasses import dataclass

import torch

from gptoss_dist.ops import gemm
from gptoss_dist.planner.datasheets import GPUS, NETWORKS, Efficiency, Gpu, Network

__all__ = ["Efficiency", "Gpu", "Network", "Peak", "find_gpu", "find_network", "gpu_of_driver", "peak_flops"]


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


def find_gpu(name: str) -> Gpu:
    """Return the GPU that a user means by `name`.

    Raises:
        ValueError: No GPU has that name; the message lists the names.
    """
    for gpu in GPUS:
        if gpu.name == name:
            return gpu
    raise ValueError(f"gpu={name!r} is unknown; use one of {', '.join(sorted(gpu.name for gpu in GPUS))}")


def find_network(name: str) -> Network:
    """Return the network that a user means by `name`.

    Raises:
        ValueError: No network has that name; the message lists the names.
    """
    for network in NETWORKS:
        if network.name == name:
            return network
    raise ValueError(f"network={name!r} is unknown; use one of {', '.join(network.name for network in NETWORKS)}")


def gpu_of_driver(name: str) -> Gpu | None:
    """Return the GPU whose driver reports `name`, or None if the table has no such GPU.

    A MIG slice reports the whole card's name but has a part of its rates, and is unknown.
    """
    if re.search(r"\bMIG\b", name):
        return None
    return next((gpu for gpu in GPUS if re.search(rf"\b{gpu.pattern}\b", name)), None)


def peak_flops(device: torch.device | str, dtype: torch.dtype, *, anew: bool = False) -> Peak | None:
    """Return the dense matmul peak of one device for operands of `dtype`.

    A CUDA or ROCm device is looked up in a table of vendor figures; fp32 is TF32 where torch is set to use it. A CPU
    has no figure worth quoting, so its matmul rate is measured (about 0.3 s, once in a process, at the current number
    of threads). If it has no instructions for bf16, bf16 is measured in float32 too, and the faster way is the peak,
    named in the label.

    Args:
        device: The device.
        dtype: Of the operands.
        anew: Measure a CPU once more, as something else may have used it before.

    Returns:
        None where the device or dtype is unknown: MFU is then left out, which the caller says once, never guessed.
    """
    device = torch.device(device)
    if device.type == "cpu":
        peak_of = _measured_gemm_peak if anew else _known_gemm_peak
        threads = torch.get_num_threads()
        peaks = [peak_of(dtype, threads)]
        if dtype == torch.bfloat16 and not gemm.CPU_MULTIPLIES_BF16:
            peaks.append(peak_of(torch.float32, threads))
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
    gpu = gpu_of_driver(name)
    if column is None or gpu is None:
        return None
    return Peak(getattr(gpu, column), f"dense {label} peak of {name}", gpu.source.flops)


@functools.cache
def _known_gemm_peak(dtype: torch.dtype, threads: int) -> Peak:
    return _measured_gemm_peak(dtype, threads)


def _measured_gemm_peak(dtype: torch.dtype, threads: int, budget_s: float = 0.3) -> Peak:
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
    name = str(dtype).removeprefix("torch.")
    label = f"measured GEMM peak of this CPU, products in {name}, {threads} thread{'s' * (threads > 1)}"
    return Peak(best, label, "best of many products of square matrices")
