"""Which rank is slow: times in which a rank works and waits for nobody.

All ranks of a synchronous run take the same time for a step, as the fast ones wait for the slowest. What tells them
apart is the time between two collectives. So now and then, in one step of many, the time in the forward pass of each
block is added up, from when its weights are gathered to when it gives its output, and the time that data were waited
for. Nothing waits for the device: on CUDA events are recorded, and read when they have passed.

    rank    data   blocks   own time
    0       2 ms    98 ms     100 ms    median
    1       3 ms    99 ms     102 ms
    2       2 ms   198 ms     200 ms    slowest: 200 / 102 = 1.96 times the median
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from gptoss_dist.distributed.heartbeat import Beat
from gptoss_dist.tracking.metrics import moment

_IN_A_ROW = 3


class OwnTime:
    """The time that the forward passes of some modules take, in steps in which it is measured.

    Args:
        modules: Modules that wait for no other rank in their forward pass. Hooks that gather their weights are there
            already, so that these hooks come after the gathering.
        device: Where they compute.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._measuring, self._data_s = False, 0.0
        self._spans: list[tuple[Any, Any]] = []
        self._handles = []
        for module in modules:
            self._handles.append(module.register_forward_pre_hook(self._before))
            self._handles.append(module.register_forward_hook(self._after, prepend=True))
        self._opened: Any = None

    def begin(self) -> None:
        """Measure from now on."""
        self._measuring, self._spans, self._data_s = True, [], 0.0

    def add_data(self, seconds: float) -> None:
        """Count time in which data were waited for."""
        self._data_s += seconds

    def end(self) -> None:
        """Measure no more."""
        self._measuring = False

    def take(self) -> float | None:
        """Return the time of the last measurement in milliseconds, once; None as long as the device is not there."""
        if self._measuring or not self._spans or (self._cuda and not self._spans[-1][1].query()):
            return None
        spans, self._spans = self._spans, []
        times = (a.elapsed_time(b) for a, b in spans) if self._cuda else (1e3 * (b - a) for a, b in spans)
        return sum(times) + 1e3 * self._data_s

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, inputs: object) -> None:
        if self._measuring:
            self._opened = self._now()

    def _after(self, module: nn.Module, inputs: object, output: object) -> None:
        if self._measuring:
            self._spans.append((self._opened, self._now()))

    def _now(self) -> Any:
        return moment(self._cuda)


class Stragglers:
    """Comparisons of the ranks' own times.

    Args:
        factor: How many times the median is slow.
        message: Tells the user of a rank that is slow in three comparisons in a row, once for each rank.
    """

    def __init__(self, factor: float, message: Callable[[str], None]) -> None:
        self._factor, self._message = factor, message
        self._in_a_row: dict[int, int] = {}

    def compare(self, beats: Sequence[Beat]) -> dict[str, float]:
        """Return `perf/slowest_rank` and `perf/step_ms_max_over_median` of a measurement of all ranks."""
        # The lower one of two in the middle: of two ranks, the faster is what the slower is measured by.
        median = statistics.median_low(beat.own_ms for beat in beats)
        slowest = max(beats, key=lambda beat: beat.own_ms)
        for beat in beats:
            is_slow = beat.own_ms > self._factor * median
            self._in_a_row[beat.rank] = self._in_a_row.get(beat.rank, 0) + 1 if is_slow else 0
            if self._in_a_row[beat.rank] == _IN_A_ROW:
                self._message(
                    f"{beat.name} is slow: {beat.own_ms:.1f} ms of its own work in step {beat.measured_step}, "
                    f"{beat.own_ms / median:.1f} times the median of all ranks, and so {_IN_A_ROW} times in a row"
                )
        return {
            "perf/slowest_rank": float(slowest.rank),
            "perf/step_ms_max_over_median": slowest.own_ms / median if median else 1.0,
        }
