"""Memory of one process over a step, from a trace of it: how much there is at every instant, and what it is for.

The recorder knows when each block of memory came and went, and a few things about it. What it is for follows:

    weights, optimizer, inputs    the engine said so before the step
    gradients                     the engine said so at the update; or a backward pass made it and left it behind
    gathered weights              written by an all-gather, or freed and filled again, as FSDP does with them
    gradient buffers              read or written by a reduce-scatter or an all-reduce
    all-to-all buffers            read or written by an all-to-all
    head                          has the vocabulary among its dimensions
    activations                   came in a forward pass, and stayed for the backward pass
    temporary                     all else: gone before the pass ends in which it came

A kernel's workspace is not among them, nor what an allocator keeps free or an idle CUDA context takes: `Margin` is.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from gptoss_dist.planner.tracing.recorder import Storage
from gptoss_dist.planner.tracing.trace import Trace

KINDS = (
    "weights",
    "optimizer",
    "gradients",
    "gathered weights",
    "gradient buffers",
    "all-to-all buffers",
    "head",
    "activations",
    "temporary",
    "inputs",
)
_BY_USE = {
    "all-gather": "gathered weights",
    "resized": "gathered weights",
    "reduce-scatter": "gradient buffers",
    "all-reduce": "gradient buffers",
    "all-to-all": "all-to-all buffers",
}


@dataclass(frozen=True)
class Margin:
    """What a device needs beyond the blocks that a step asks for."""

    fixed: float = 1.6e9
    """Bytes of a CUDA context with its loaded kernels (0.5 GB), NCCL's buffers and cuBLAS's workspaces (1 GB): assumed,
    to be measured by `launch/prove_gpu.sh` (memory that the driver counts, less what torch reserves)."""
    fragmentation: float = 0.05
    """Share of the peak that the caching allocator holds beside it: assumed; OLMo-core and torchtitan report reserved
    memory 2 to 10 % above allocated memory."""

    def of(self, peak: float) -> float:
        """Return the bytes beside a peak of `peak` bytes."""
        return self.fixed + self.fragmentation * peak


NO_MARGIN = Margin(0.0, 0.0)
"""For CPUs, where the peak is compared with what the allocator counted."""


@dataclass(frozen=True)
class MemoryTimeline:
    """Bytes by what they are for, at every operator of a step."""

    by_kind: dict[str, np.ndarray]
    """For each of `KINDS` that occurs, the bytes after each operator, int64 [operators]."""
    phases: list[str]
    """The phase of each operator."""

    @property
    def total(self) -> np.ndarray:
        """Bytes in all after each operator, int64 [operators]."""
        return np.sum(list(self.by_kind.values()), axis=0)

    @property
    def peak(self) -> int:
        """The most bytes at any instant."""
        return int(self.total.max())

    def passes(self) -> list[tuple[str, slice]]:
        """Return the phases in order, each with its operators: a forward and a backward pass per micro-batch, ..."""
        borders = [0, *(i for i in range(1, len(self.phases)) if self.phases[i] != self.phases[i - 1])]
        return [(self.phases[a], slice(a, b)) for a, b in itertools.pairwise([*borders, len(self.phases)])]

    def peaks(self) -> dict[str, dict[str, int]]:
        """Return, for each phase, the bytes by kind at its instant with the most of them."""
        return peaks([(phase, {k: v[part] for k, v in self.by_kind.items()}) for phase, part in self.passes()])


def peaks(passes: list[tuple[str, dict[str, np.ndarray]]]) -> dict[str, dict[str, int]]:
    """Return, for each phase, the bytes by kind at its instant with the most of them.

    Args:
        passes: Each phase with the bytes by kind at its instants; a phase may come more than once.
    """
    found: dict[str, dict[str, int]] = {}
    for phase, by_kind in passes:
        instant = int(np.sum(list(by_kind.values()), axis=0).argmax())
        here = {kind: int(values[instant]) for kind, values in by_kind.items()}
        if sum(here.values()) > sum(found.get(phase, {}).values()):
            found[phase] = here
    return found


def memory_timeline(trace: Trace) -> MemoryTimeline:
    """Return what a traced process holds over its step."""
    phases = [operator.phase for operator in trace.step]
    segments = [0, *itertools.accumulate(int(a != b) for a, b in itertools.pairwise(phases))]
    changes = {kind: np.zeros(len(phases) + 1, dtype=np.int64) for kind in KINDS}
    for storage in trace.storages:
        change, size = changes[_kind(storage, trace.begin, segments)], 0
        for index, nbytes in storage.sizes:
            # A block that an operator brings is there after it; one that goes before the first is not seen at all.
            change[min(max(index - trace.begin, 0), len(phases))] += nbytes - size
            size = nbytes
    by_kind = {kind: change[:-1].cumsum() for kind, change in changes.items()}
    return MemoryTimeline({kind: values for kind, values in by_kind.items() if values.any()}, phases)


def _kind(storage: Storage, begin: int, segments: list[int]) -> str:
    if storage.role is not None:
        return storage.role
    for use, kind in _BY_USE.items():
        if use in storage.uses:
            return kind
    if storage.vocabulary:
        return "head"
    born, died = storage.sizes[0][0] - begin, storage.last - begin
    if born < 0:  # left by the step before
        return "temporary"
    stays = died >= len(segments) or segments[min(born, len(segments) - 1)] != segments[int(died)]
    if not stays or storage.phase == "update":
        return "temporary"
    return "activations" if storage.phase == "forward" else "gradients"
