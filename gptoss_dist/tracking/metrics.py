"""What a training step reports: its parts' durations, expert load, memory and throughput, under fixed names.

Names sort into sections in MLflow: `data/`, `loss/`, `moe/`, `optim/`, `perf/`, `progress/`. Functions return plain
`dict[str, float]` for the tracker to log.

Shapes: L layers, E experts, R ranks.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor

from data_pipeline.batches.mixture import Usage
from gptoss_dist.planner.flops import FlopCount, mfu
from gptoss_dist.planner.hardware import Peak

PERPLEXITY_LOSS_CAP = 20.0
_GIB = 2**30
_LAST_MEASUREMENT = 2**13
"""Steps faster than the peak after which it is not measured any more, each time for about 0.3 s."""


def perplexity(loss: float) -> float:
    """Return exp(loss) of a token cross-entropy in nats, capped at exp(20) so that a diverging run still plots."""
    return math.exp(min(loss, PERPLEXITY_LOSS_CAP)) if not math.isnan(loss) else math.nan


def loss_metrics(split: str, loss: float) -> dict[str, float]:
    """Return `loss/<split>` and `loss/<split>_ppl`, where split is `train` or `val`, without auxiliary terms."""
    return {f"loss/{split}": loss, f"loss/{split}_ppl": perplexity(loss)}


def mixture_metrics(usage: list[Usage]) -> dict[str, float]:
    """Return `data/epochs`, or of several sources `data/<name>_epochs` and `data/<name>_share` (of the tokens)."""
    if len(usage) == 1:
        return {"data/epochs": usage[0].epochs}
    metrics = {f"data/{source.name}_epochs": source.epochs for source in usage}
    return metrics | {f"data/{source.name}_share": source.share for source in usage}


class StepTimer:
    """A timer of a step's phases (`data`, `compute`, `optimizer`), which never waits for the device.

        timer.start()
        with timer.phase("data"): ...
        with timer.phase("compute"): ...
        metrics |= timer.stop()

    A phase may be entered many times in one step (gradient accumulation): its times add up. On CPU the clock is the
    host's. On CUDA it is the device's: phases are marked by events on the current stream, so `perf/data_ms` is the
    time for which the device stood idle or copied while the host fetched data, not the host's own waiting.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._cuda = torch.device(device).type == "cuda"
        # Clock readings: seconds on CPU, torch.cuda.Event on CUDA.
        self._spans: list[tuple[str, Any, Any]] = []
        self._started: Any = None
        self._pending: deque[list[tuple[str, Any, Any]]] = deque()

    def start(self) -> None:
        """Begin a step; what an interrupted one left behind is forgotten."""
        self._spans = []
        self._started = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the enclosed work under `perf/<name>_ms`."""
        before = self._now()
        yield
        self._spans.append((name, before, self._now()))

    def stop(self) -> dict[str, float]:
        """End the step.

        Returns:
            `perf/step_ms` and `perf/<phase>_ms` in milliseconds: of this step on CPU; on CUDA of the newest step whose
            events have passed, usually the one before, and {} while there is none.
        """
        assert self._started is not None, "stop() without start()"
        self._spans.append(("step", self._started, self._now()))
        self._pending.append(self._spans)
        self._started = None
        finished = None
        # The last event of a step is recorded last on its stream: once it has passed, all have.
        while self._pending and (not self._cuda or self._pending[0][-1][2].query()):
            finished = self._pending.popleft()
        result: dict[str, float] = {}
        for name, before, after in finished or ():
            elapsed = before.elapsed_time(after) if self._cuda else 1e3 * (after - before)
            result[f"perf/{name}_ms"] = result.get(f"perf/{name}_ms", 0.0) + elapsed
        return result

    def _now(self) -> Any:
        return moment(self._cuda)


def moment(cuda: bool) -> Any:
    """Return what marks this moment in the work: an event on the GPU's stream, or the host's clock in seconds."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Throughput:
    """Tokens per second of each step, and tokens seen so far.

    Args:
        devices: Number of devices that share the tokens (the world size).
        tokens: Tokens already seen by the run, from a checkpoint.
        flops: FLOPs of the model. With `peak` too, `perf/mfu` is reported (see `flops.MFU_CONVENTION`).
        peak: Peak rate of a device; None if it is unknown.
        measure_peak: What measures the peak once more, if it is a measured one. A step faster than the peak shows that
            something else used the machine when it was measured.
    """

    def __init__(
        self,
        devices: int,
        *,
        tokens: int = 0,
        flops: FlopCount | None = None,
        peak: Peak | None = None,
        measure_peak: Callable[[], Peak | None] | None = None,
    ) -> None:
        self.tokens, self.peak = tokens, peak
        self._devices = devices
        self._flops, self._measure_peak = flops, measure_peak
        self._impossible = 0  # steps that were faster than the peak

    def step(self, tokens: int, timing: dict[str, float]) -> dict[str, float]:
        """Count one step's tokens, all ranks together.

        The rate is that of the step by `timing`, what `StepTimer.stop` returned: results are read late and in bursts,
        and validation or checkpoints lie between steps, so the time between two calls says nothing.
        """
        self.tokens += tokens
        metrics: dict[str, float] = {"progress/tokens": self.tokens}
        if milliseconds := timing.get("perf/step_ms"):
            rate = 1e3 * tokens / milliseconds
            metrics["perf/tokens_per_s"] = rate
            metrics["perf/tokens_per_s_per_device"] = rate / self._devices
            share = self._utilisation(rate / self._devices)
            if share is not None and share <= 1:  # a greater one cannot be true
                metrics["perf/mfu"] = share
        return metrics

    def _utilisation(self, rate: float) -> float | None:
        if self._flops is None or self.peak is None:
            return None
        share = mfu(self._flops, rate, self.peak)
        if share > 1 and self._measure_peak is not None:
            self._impossible += 1
            # Twice as long between two measurements each time: what keeps the machine busy may last.
            if self._impossible.bit_count() == 1 and self._impossible < _LAST_MEASUREMENT:
                again = self._measure_peak()
                if again is not None and again.value > self.peak.value:
                    self.peak = again
                    share = mfu(self._flops, rate, again)
        return share


def expert_load(counts_LE: Tensor, entropy_L: Tensor | None = None) -> dict[str, float]:
    """Return how evenly the routers distribute the tokens, per layer and over layers.

    Args:
        counts_LE: Tokens sent to each expert in each layer, summed over micro-batches and ranks.
        entropy_L: Mean routing entropy per token in nats (ln E is uniform).

    Returns:
        Per layer `moe/load_cv/layer_N` (standard deviation over mean; 0 is even), `moe/load_max_over_mean/layer_N`,
        `moe/dead_experts/layer_N` (experts without a token) and `moe/entropy/layer_N`; over layers `moe/load_cv`
        (mean), `moe/load_max_over_mean` (worst layer), `moe/dead_experts` (sum) and `moe/router_entropy` (mean).
        The device is read once.

    Raises:
        ValueError: The shapes do not fit.
    """
    if counts_LE.ndim != 2 or (entropy_L is not None and entropy_L.shape != counts_LE.shape[:1]):
        raise ValueError(
            f"expert_load needs counts [L, E] and entropy [L], got {tuple(counts_LE.shape)} and "
            f"{None if entropy_L is None else tuple(entropy_L.shape)}"
        )
    counts_LE = counts_LE.detach().float()
    # A layer that saw no token is reported as even and dead rather than as 0 / 0.
    mean_L = counts_LE.mean(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    columns = {
        "load_cv": counts_LE.std(dim=1, correction=0) / mean_L,
        "load_max_over_mean": counts_LE.amax(dim=1) / mean_L,
        "dead_experts": (counts_LE == 0).sum(dim=1).float(),
    }
    if entropy_L is not None:
        columns["entropy"] = entropy_L.detach().float()
    per_layer = dict(zip(columns, torch.stack(list(columns.values())).tolist()))

    metrics = {
        f"moe/{name}/layer_{layer}": value for name, values in per_layer.items() for layer, value in enumerate(values)
    }
    layers = counts_LE.shape[0]
    metrics["moe/load_cv"] = sum(per_layer["load_cv"]) / layers
    metrics["moe/load_max_over_mean"] = max(per_layer["load_max_over_mean"])
    metrics["moe/dead_experts"] = sum(per_layer["dead_experts"])
    if entropy_L is not None:
        metrics["moe/router_entropy"] = sum(per_layer["entropy"]) / layers
    return metrics


def exchange_metrics(traffic_R3: Tensor) -> dict[str, float]:
    """Return what expert parallelism costs, and how unevenly it loads the ranks.

    Args:
        traffic_R3: For each rank, the token copies that its experts computed (a token counts once per expert), the
            bytes that its all-to-alls sent to other ranks, and the seconds in all-to-alls.

    Returns:
        `moe/rank_rows_max_over_mean` (1 is even, R is one rank computing everything; 1 if nothing was to be computed),
        `perf/all_to_all_gib` (sent by all ranks together, gradients and recomputation included) and
        `perf/all_to_all_ms` (mean over ranks, waiting for slower ranks included). The device is read once.

    Raises:
        ValueError: The shape is not [R, 3].
    """
    if traffic_R3.ndim != 2 or traffic_R3.shape[1] != 3 or not len(traffic_R3):
        raise ValueError(f"exchange_metrics needs traffic [R, 3], got {tuple(traffic_R3.shape)}")
    rows, sent, seconds = traffic_R3.double().T.tolist()
    mean = sum(rows) / len(rows)
    return {
        "moe/rank_rows_max_over_mean": max(rows) / mean if mean else 1.0,
        "perf/all_to_all_gib": sum(sent) / _GIB,
        "perf/all_to_all_ms": 1e3 * sum(seconds) / len(seconds),
    }


def memory_metrics(device: torch.device | str, process: psutil.Process | None = None) -> dict[str, float]:
    """Return the memory of this process in GiB.

    Args:
        device: The device whose memory is told too.
        process: This process. Looking it up takes longer than all else here.

    Returns:
        `perf/memory_rss_gib` and `perf/memory_peak_rss_gib` of the host; on CUDA also `perf/memory_allocated_gib`,
        `perf/memory_reserved_gib` and `perf/memory_peak_allocated_gib` of the device.
    """
    # Linux reports the high-water mark in KiB, macOS in bytes.
    peak_unit = 1 if sys.platform == "darwin" else 1024
    metrics = {
        "perf/memory_rss_gib": (process or psutil.Process()).memory_info().rss / _GIB,
        "perf/memory_peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * peak_unit / _GIB,
    }
    if torch.device(device).type == "cuda":
        metrics["perf/memory_allocated_gib"] = torch.cuda.memory_allocated(device) / _GIB
        metrics["perf/memory_reserved_gib"] = torch.cuda.memory_reserved(device) / _GIB
        metrics["perf/memory_peak_allocated_gib"] = torch.cuda.max_memory_allocated(device) / _GIB
    return metrics
