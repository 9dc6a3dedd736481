"""How long a traced step takes: its operators and collectives on a time line of streams.

    host          issues operators in order; a GPU runs them later, a CPU at once
    compute       one operator at a time, in order
    all-gather    communication of one kind and one group, one after another, beside the compute stream
    ...

An operator starts when the host has issued it, its stream is free and what it reads is there; the last follows from the
storages in the trace. So an exchange of the experts' rows, whose result is read at once, comes out exposed, and an
all-gather of the next block's weights overlaps. Three rules are those of FSDP2, and not data dependencies:

- What packs weights before an all-gather runs beside the compute stream.
- At most one all-gather is ahead: each waits until the result of the one before the previous one was unpacked.
- What works on reduced gradients before the update runs on the stream of the reduce-scatter.

The exchange of row counts makes the host wait, because it needs them for the shapes of what follows. Streams do not
slow each other down here; in truth NCCL takes some of the multiprocessors and of the memory's bandwidth.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from gptoss_dist.planner.flops import FlopCount
from gptoss_dist.planner.hardware import Network, Peak
from gptoss_dist.planner.timing.fusion import fuse
from gptoss_dist.planner.timing.kinds import Kind, base_name, kind_of, label_of
from gptoss_dist.planner.timing.prices import Hardware, collective_s
from gptoss_dist.planner.tracing.recorder import Operator
from gptoss_dist.planner.tracing.trace import Trace

COMPUTE = "compute"
PACKS = ("foreach_copy", "all_gather_copy_in", "cat")
"""Operators that pack weights, if they come right before an all-gather."""


class Event(NamedTuple):
    """One operator on the time line, for a picture."""

    start: float
    """Seconds from the step's begin."""
    end: float
    stream: str
    label: str


@dataclass
class StepTime:
    """What one optimizer step of one process takes, in seconds unless it says otherwise."""

    seconds: float = 0.0
    by_kind: dict[str, float] = field(default_factory=dict)
    """Of the device by class of operator; collectives by what they are, hidden or not."""
    by_phase: dict[str, float] = field(default_factory=dict)
    """Of the compute stream: `forward`, `backward` (recomputation included), `update`."""
    exposed: dict[str, float] = field(default_factory=dict)
    """In which the compute stream waits for a collective, by what that is."""
    host_bound: float = 0.0
    """In which the compute stream waits for the host."""
    kernels: float = 0.0
    """How many operators have a kernel."""
    events: list[Event] = field(default_factory=list)

    @property
    def exposed_s(self) -> float:
        """Seconds in which the compute stream waits for any collective."""
        return sum(self.exposed.values())

    @property
    def host_bound_share(self) -> float:
        """The part of the step in which the compute stream waits for the host."""
        return self.host_bound / self.seconds

    def tokens_per_s(self, tokens: int) -> float:
        """Return the throughput of a process that is given `tokens` tokens in a step, all micro-batches together."""
        return tokens / self.seconds

    def mfu(self, flops: FlopCount, tokens: int, peak: Peak) -> float:
        """Return the model FLOPs utilisation by `MFU_CONVENTION`, of a process that is given `tokens` tokens."""
        return flops.step(tokens) / self.seconds / peak.value


def simulate(
    trace: Trace, hardware: Hardware, network: Network | None = None, node_size: int = 8, *, compiled: bool = False
) -> StepTime:
    """Return how long the step of a trace takes.

    Args:
        trace: One step of one process.
        hardware: A GPU by its datasheet (`DatasheetHardware`), or a calibrated machine (`Calibration`).
        network: What joins nodes; None if there is one.
        node_size: Processes per node; ranks are numbered node by node.
        compiled: The blocks are compiled (`train.compile`): elementwise operators are fused as `fusion.py` says.

    Raises:
        ValueError: The trace has several nodes, and no network is given.
    """
    operators = fuse(trace.step) if compiled else trace.step
    line = _TimeLine(hardware, network, node_size)
    packs = _packing(operators)
    for index, operator in enumerate(operators):
        kind = kind_of(operator)
        if kind is Kind.COLLECTIVE:
            line.collective(operator)
        elif kind is not Kind.NOTHING:
            line.compute(operator, packs=index in packs)
    return line.finished()


def extrapolate(low: StepTime, high: StepTime, sizes: tuple[float, float], size: float) -> StepTime:
    """Return the step of a model of `size` layers, from those of two smaller ones, linearly.

    Layers repeat: sliding and full attention take turns, and with checkpointing every n-th block is recomputed. Two
    models that differ by whole periods tell what a period costs. The same holds for micro-batches of a step.

    Args:
        low: The step of the smaller model.
        high: The step of the greater one.
        sizes: Their layers, or their micro-batches.
        size: The layers, or micro-batches, that are asked for.

    Returns:
        The step; `events` are those of the greater model.
    """
    factor = (size - sizes[0]) / (sizes[1] - sizes[0])

    def along(a, b):
        if isinstance(a, dict):
            return {key: along(a.get(key, 0.0), b.get(key, 0.0)) for key in a | b}
        return a + factor * (b - a)

    names = [f.name for f in fields(StepTime) if f.name != "events"]
    return StepTime(**{name: along(getattr(low, name), getattr(high, name)) for name in names}, events=high.events)


def _packing(operators: list[Operator]) -> set[int]:
    """Return the indices of the operators that pack weights: right before an all-gather, allocations aside."""
    found: set[int] = set()
    previous = None
    for index, operator in enumerate(operators):
        kind = kind_of(operator)
        if kind is Kind.NOTHING:
            continue
        gathers = kind is Kind.COLLECTIVE and label_of(operator) == "all-gather"
        if gathers and previous is not None and base_name(operators[previous]) in PACKS:
            found.add(previous)
        previous = index
    return found


class _TimeLine:
    def __init__(self, hardware: Hardware, network: Network | None, node_size: int) -> None:
        self.hardware, self.network, self.node_size = hardware, network, node_size
        self.host = 0.0
        self.free: dict[str, float] = {COMPUTE: 0.0}
        """When each stream has nothing left to do."""
        self.ready: dict[int, tuple[float, str]] = {}
        """When the content of each storage is there, and on which stream it was made."""
        self.reduced: dict[int, str] = {}
        """Storages of reduced gradients, and the stream that reduces them."""
        self.gathered: dict[int, int] = {}
        """Storages that the n-th all-gather has filled and nobody has read."""
        self.unpacked: list[float] = []
        """When the result of each all-gather was read."""
        self.step = StepTime()
        self.kinds: defaultdict[str, float] = defaultdict(float)
        self.phases: defaultdict[str, float] = defaultdict(float)
        self.exposed: defaultdict[str, float] = defaultdict(float)

    def compute(self, operator: Operator, packs: bool) -> None:
        """Run an operator that is no collective."""
        seconds = self.hardware.compute_s(operator)
        self._launch()
        label = label_of(operator)
        stream = COMPUTE
        if packs:
            stream = "packing"
        elif operator.phase != "update":
            # A gradient is added to while others are computed; the first stream that reduced an operand does it.
            stream = next((self.reduced[s] for s in operator.inputs if s in self.reduced), COMPUTE)
        inputs, source = self._inputs(operator.inputs)
        begin = self.free.get(stream, 0.0)
        start = max(begin, self.host, inputs)
        end = self.free[stream] = start + seconds
        if stream == COMPUTE:
            self._account_for_idling(begin, inputs, source)
            self.phases[operator.phase] += seconds
        self.kinds[label] += seconds
        self.step.events.append(Event(start, end, stream, label))
        for storage in operator.inputs:
            if storage in self.gathered:
                gather = self.gathered.pop(storage)
                self.unpacked[gather] = end
        for storage in operator.outputs:
            self.ready[storage] = (end, stream)
            if stream not in (COMPUTE, "packing"):
                self.reduced[storage] = stream
        if not self.hardware.runs_ahead:
            self.host = end

    def collective(self, operator: Operator) -> None:
        """Start a collective on the stream of its kind and group."""
        label = label_of(operator)
        seconds = collective_s(operator, self.hardware, self.network, self.node_size)
        self._launch()
        # An all-to-all has a communicator of its own; what shards share one for all that they send.
        kind = label if label == "all-to-all" else "shards"
        stream = f"{kind} of {len(operator.group)}"
        start = max(self.free.get(stream, 0.0), self.host, self._inputs(operator.inputs)[0])
        if label == "all-gather":
            if len(self.unpacked) >= 2:
                start = max(start, self.unpacked[-2])
            self.unpacked.append(0.0)
        end = self.free[stream] = start + seconds
        self.kinds[label] += seconds
        self.step.events.append(Event(start, end, stream, label))
        # torch does not declare what an all-to-all writes; it is the first operand.
        for storage in operator.outputs or operator.inputs[:1]:
            self.ready[storage] = (end, label)
            if label == "all-gather":
                self.gathered[storage] = len(self.unpacked) - 1
            if label == "reduce-scatter":
                self.reduced[storage] = stream
        if label == "all-to-all" and operator.dtype is None and self.hardware.runs_ahead:
            self.host = max(self.host, end) + self.hardware.host_sync_s

    def finished(self) -> StepTime:
        """Return what was found, the last collective awaited."""
        self.step.seconds = max([self.host, *self.free.values()])
        self.step.by_kind, self.step.by_phase = dict(self.kinds), dict(self.phases)
        self.step.exposed = dict(self.exposed)
        if (left := self.step.seconds - max(self.free[COMPUTE], self.host)) > 0:
            last = max(self.step.events, key=lambda event: event.end)
            self.step.exposed[last.label] = self.step.exposed.get(last.label, 0.0) + left
        return self.step

    def _launch(self) -> None:
        self.host += self.hardware.launch_s if self.hardware.runs_ahead else 0.0
        self.step.kernels += 1

    def _inputs(self, storages: tuple[int, ...]) -> tuple[float, str]:
        """Return when all of some storages are there, and on which stream the last of them was made."""
        return max((self.ready[storage] for storage in storages if storage in self.ready), default=(0.0, COMPUTE))

    def _account_for_idling(self, begin: float, inputs: float, source: str) -> None:
        if self.hardware.runs_ahead and self.host > max(begin, inputs):
            self.step.host_bound += self.host - max(begin, inputs)
        if inputs > begin and source not in (COMPUTE, "packing"):
            self.exposed[source] += inputs - begin
