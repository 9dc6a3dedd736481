"""Measure what a machine does, in about a minute: the rates that `calibration.py` keeps.

Each figure is the median of a few repetitions. With one thread the clock is that of the thread, so that others who use
the machine cost little; with several, or on a GPU, it is the wall's. The path for CUDA is the same code with a
synchronised clock and larger sizes; nobody has run it on a GPU yet.
"""

from __future__ import annotations

import datetime
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptoss_dist.engine import Objective
from gptoss_dist.ops.attention.sink_attention import sink_attention
from gptoss_dist.ops.gemm import CPU_MULTIPLIES_BF16
from gptoss_dist.planner.flops import visible_pairs
from gptoss_dist.planner.timing.calibration import Attention, Calibration, Curve, Curves
from gptoss_dist.planner.timing.collectives import measure_collectives
from gptoss_dist.planner.timing.steps import with_operator_s

WINDOW = 128


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    smallest: tuple[int, ...] = (8, 32, 128, 512)
    """Smallest dimensions of products."""
    others: tuple[int, ...] = (128, 512, 2048)
    """The other dimensions of products."""
    tokens: tuple[int, ...] = (256, 512, 1024, 2048)
    """Of the sequences of attention."""
    head_dims: tuple[int, ...] = (32, 64, 128)
    heads: int = 4
    numbers: tuple[int, ...] = (4096, 65536, 1 << 20, 1 << 23)
    """Lengths of vectors."""
    rows: tuple[int, ...] = (32, 256, 2048)
    """Of an expert; CUDA only."""
    messages: tuple[int, ...] = (1 << 12, 1 << 16, 1 << 20, 1 << 24)
    """Bytes that a process sends."""


CUDA_SIZES = Sizes(
    smallest=(64, 512, 2048, 4096),
    others=(1024, 4096, 8192),
    tokens=(1024, 4096, 8192),
    head_dims=(64, 128),
    heads=32,
    numbers=(1 << 16, 1 << 20, 1 << 24, 1 << 27),
    messages=(1 << 16, 1 << 20, 1 << 24, 1 << 28),
)


@dataclass(frozen=True)
class Meter:
    """A clock for short functions."""

    device: torch.device
    budget_s: float = 0.25
    """Seconds that one figure may take, beyond its first calls."""

    def seconds(self, function: Callable[[], object]) -> float:
        """Return the median seconds of one call."""
        for _ in range(2):
            once = self._time(function, 1)
        calls = max(1, int(2e-4 / max(once, 1e-7)))
        repeats = min(15, max(5, int(self.budget_s / max(once * calls, 1e-6))))
        return statistics.median(self._time(function, calls) / calls for _ in range(repeats))

    def _time(self, function: Callable[[], object], calls: int) -> float:
        self._wait()
        begin = self._now()
        for _ in range(calls):
            function()
        self._wait()
        return self._now() - begin

    def _now(self) -> float:
        # A backward pass on a CPU runs in the thread that asks for it.
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        return time.thread_time() if alone else time.perf_counter()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def calibrate(
    objective: Objective,
    device: torch.device | str = "cpu",
    name: str = "this-machine",
    *,
    sizes: Sizes | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Measure this machine, with as many CPU threads as the process has.

    Args:
        objective: What a step computes, `next_token_prediction`; it is passed on to other processes.
        device: `cpu`, or a CUDA device.
        name: What the calibration is called.
        sizes: What to measure; None for what suits the device.
        report: Called with a line of progress before each part.
    """
    device = torch.device(device)
    sizes = sizes or (Sizes() if device.type == "cpu" else CUDA_SIZES)
    meter = Meter(device)
    dtypes = [torch.float32]
    if device.type == "cuda" or CPU_MULTIPLIES_BF16:
        dtypes.append(torch.bfloat16)
    report("products")
    products = {_name(dtype): measure_products(meter, sizes, dtype) for dtype in dtypes}
    grouped = {"bfloat16": measure_grouped(meter, sizes)} if device.type == "cuda" else {}
    report("attention")
    attention = {_name(dtype): measure_attention(meter, sizes, dtype) for dtype in dtypes}
    report("memory, exponentials, sorts, optimizer")
    rates: dict[str, Any] = {
        "memory": _curve(sizes.numbers, lambda count: 12 * count, lambda count: _multiplication(meter, count)),
        "rows": _curve(sizes.numbers, lambda count: 8 * count, lambda count: _gather(meter, count)),
        "exponentials": _curve(sizes.numbers, lambda count: count, lambda count: _sigmoid(meter, count)),
        "sorts": _curve(sizes.numbers[:-1], lambda count: count, lambda count: _sort(meter, count)),
        "optimizer": _curve(sizes.numbers, lambda count: 28 * count, lambda count: _adamw(meter, count)),
    }
    report("collectives of two processes")
    collectives = measure_collectives(device, sizes.messages)
    result = Calibration(
        name=name,
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        date=datetime.date.today().isoformat(),
        torch_version=str(torch.__version__),
        threads=torch.get_num_threads(),
        operator_s=0.0,
        sync_s=_sync_s(meter),
        products=products,
        grouped=grouped,
        attention=attention,
        collectives=collectives,
        **rates,
    )
    report("a step of a tiny model, for what an operator costs the host")
    return with_operator_s(result, objective)


def measure_products(meter: Meter, sizes: Sizes, dtype: torch.dtype) -> Curves:
    """Return FLOP/s by the smallest dimension of a product, which is once the inner one and once a side."""

    def seconds(small: int, other: int) -> float:
        wide, tall, square = (
            torch.randn(shape, device=meter.device).to(dtype)
            for shape in ((small, other), (other, small), (other, other))
        )
        inner = meter.seconds(lambda: torch.mm(tall, wide))
        side = meter.seconds(lambda: torch.mm(square, tall))
        return math.sqrt(inner * side)

    found = {}
    for small in sizes.smallest:
        others = [other for other in sizes.others if other >= small]
        rates = [2.0 * small * other * other / seconds(small, other) for other in others]
        found[small] = Curve([float(other) for other in others], rates)
    return found


def measure_grouped(meter: Meter, sizes: Sizes, experts: int = 8, width: int = 2048) -> Curve:
    """Return FLOP/s of torch's grouped product in bf16, by rows of an expert."""

    def seconds(rows: int) -> float:
        x = torch.randn(experts * rows, width, device=meter.device, dtype=torch.bfloat16)
        weights = torch.randn(experts, width, width, device=meter.device, dtype=torch.bfloat16)
        ends = torch.arange(1, experts + 1, device=meter.device, dtype=torch.int32) * rows
        return meter.seconds(lambda: torch._grouped_mm(x, weights, ends))

    return Curve(
        [float(rows) for rows in sizes.rows],
        [2 * experts * rows * width * width / seconds(rows) for rows in sizes.rows],
    )


def measure_attention(meter: Meter, sizes: Sizes, dtype: torch.dtype) -> Attention:
    """Return FLOP/s of sink attention, as `Attention` has them."""
    found: dict[str, Curves] = {"forward": {}, "backward": {}, "windowed_forward": {}, "windowed_backward": {}}
    for dim in sizes.head_dims:
        for prefix, window in (("", None), ("windowed_", WINDOW)):
            both = [_attention_rates(meter, sizes.heads, tokens, dim, window, dtype) for tokens in sizes.tokens]
            tokens = [float(count) for count in sizes.tokens]
            found[f"{prefix}forward"][dim] = Curve(tokens, [forward for forward, _ in both])
            found[f"{prefix}backward"][dim] = Curve(tokens, [backward for _, backward in both])
    return Attention(**found)


def _attention_rates(
    meter: Meter, heads: int, tokens: int, dim: int, window: int | None, dtype: torch.dtype
) -> tuple[float, float]:
    def operand(count: int) -> Tensor:
        x_BTHD = torch.randn(1, tokens, count, dim, device=meter.device).to(dtype).requires_grad_()
        return x_BTHD.transpose(1, 2)

    q, k, v = operand(heads), operand(heads // 2), operand(heads // 2)
    sinks = torch.zeros(heads, device=meter.device, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        forward = meter.seconds(lambda: sink_attention(q, k, v, sinks, window=window))
    out = sink_attention(q, k, v, sinks, window=window)
    gradient = torch.randn_like(out)
    backward = meter.seconds(lambda: torch.autograd.grad(out, (q, k, v, sinks), gradient, retain_graph=True))
    product = heads * dim * visible_pairs(tokens, window)
    return 4 * product / forward, 10 * product / backward


def _curve(sizes: tuple[int, ...], work: Callable[[int], float], seconds: Callable[[int], float]) -> Curve:
    """Return work per second by work."""
    return Curve([float(work(size)) for size in sizes], [work(size) / seconds(size) for size in sizes])


def _multiplication(meter: Meter, count: int) -> float:
    a, b, out = (torch.ones(count, device=meter.device) for _ in range(3))
    return meter.seconds(lambda: torch.mul(a, b, out=out))


def _gather(meter: Meter, count: int, width: int = 256) -> float:
    table = torch.randn(count // width, width, device=meter.device)
    order = torch.randperm(len(table), device=meter.device)
    return meter.seconds(lambda: table.index_select(0, order))


def _sigmoid(meter: Meter, count: int) -> float:
    x = torch.randn(count, device=meter.device)
    return meter.seconds(lambda: torch.sigmoid_(x))


def _sort(meter: Meter, count: int) -> float:
    x = torch.randint(0, 64, (count,), device=meter.device, dtype=torch.int32)
    return meter.seconds(lambda: torch.sort(x, stable=True))


def _adamw(meter: Meter, count: int) -> float:
    weights = torch.nn.Parameter(torch.randn(count, device=meter.device))
    weights.grad = torch.randn_like(weights)
    optimizer = torch.optim.AdamW([weights], fused=True)
    return meter.seconds(optimizer.step)


def _sync_s(meter: Meter) -> float:
    value = torch.ones((), device=meter.device)
    return meter.seconds(lambda: value.item())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
