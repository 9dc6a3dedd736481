"""A deep model's step from two shallow ones: layers repeat, so what a step needs is a straight line in their number.

Layers alternate between sliding and full attention, and every n-th is checkpointed: after lcm(2, n) of them all is as
before. Models of one and of two such periods are traced, and every quantity of the deep one, such as the bytes of one
kind of memory or of one kind of collective, is read off the line through both:

    layers    2          4                        24
    bytes     b          b + one period           b + 11 periods

A model of 25 layers is told from those of 3 and 5.

The micro-batches of a step repeat in the same way, from the second one on. The trace of them all is there for whoever
has the time (`in_full`); `tests/planner/tracing/test_reduced.py` compares.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from gptoss_dist.engine import EngineSettings, engine_kind
from gptoss_dist.engine.zero_settings import zero_stage
from gptoss_dist.planner.parameters import count_parameters
from gptoss_dist.planner.tracing.memory import MemoryTimeline, memory_timeline, peaks
from gptoss_dist.planner.tracing.recorder import Operator, collective_kind
from gptoss_dist.planner.tracing.trace import Trace, Workload, trace_step

ZERO3_GATHERED = 1e9
"""Elements that ZeRO 3 leaves gathered by default (`stage3_max_live_parameters` of DeepSpeed 0.19)."""
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Traffic:
    """One kind of collective over one group of processes, in one step of one process."""

    kind: str
    """Such as `all-gather`."""
    ranks: int
    """Processes that take part."""
    nodes: int
    """Machines that they sit on."""
    calls: float
    sent: float
    """Bytes that this process sends, by the ring model."""
    between: float
    """Those of the bytes that leave the machine, on average over its processes.

    A ring crosses each machine's border once, whatever the number of its processes there; an all-to-all sends to
    everybody alike, or to whom its sizes say: those of context parallelism go to neighbours.
    """

    @property
    def spans_nodes(self) -> bool:
        """Whether they sit on more than one machine."""
        return self.nodes > 1


Size = tuple[int, int]
"""Layers of a model, and micro-batches of its step."""


_Group = tuple[str, int, int]
"""The kind of a collective, how many take part, and on how many machines they sit."""


@dataclass(frozen=True)
class TracedStep:
    """A step of a model of some size, from traces of the same size or of smaller ones."""

    size: Size
    traces: dict[Size, Trace]
    timelines: dict[Size, MemoryTimeline]

    def quantities(self, of: Callable[[Trace], Mapping[K, float]]) -> dict[K, float]:
        """Return quantities of the step that are straight lines in layers and in micro-batches."""
        return self.on_the_line({size: of(trace) for size, trace in self.traces.items()})

    def on_the_line(self, values: Mapping[Size, Mapping[K, float]]) -> dict[K, float]:
        """Return what values of the traced sizes say of the step: by layers first, then by micro-batches."""
        by_count = {}
        for count in sorted({count for _, count in values}):
            depths = {layers: value for (layers, c), value in values.items() if c == count}
            by_count[count] = _line(depths, self.size[0])
        return _line(by_count, self.size[1])

    def peaks(self) -> dict[str, dict[str, int]]:
        """Return, for each phase, the bytes by kind at its instant with the most of them.

        From the second micro-batch on all are alike. Where in a pass the instant lies may depend on the number of
        layers. So the line is drawn for every instant of the shallower model, with that of the deeper one that is as
        far from the beginning of the same pass, or, from the middle of the layers on, as far from its end. Between the
        layers near both ends nothing is higher: from layer to layer memory grows, or shrinks, evenly.
        """
        count = max(count for _, count in self.timelines)
        few, many = min(depths := [layers for layers, c in self.timelines if c == count]), max(depths)
        low, high = self.timelines[few, count], self.timelines[many, count]
        names_low, names_high = ([o.name for o in self.traces[n, count].step] for n in (few, many))
        if few == many:
            return self._with_inputs(low.peaks(), low, count)
        deep = []
        for (phase, a), (same, b) in zip(low.passes(), high.passes(), strict=True):
            assert phase == same
            n, m = a.stop - a.start, b.stop - b.start
            instants = np.arange(n)
            middle = middle_of_layers(names_low[a], names_high[b])
            partner = b.start + np.where(instants < middle, instants, m - n + instants)
            by_kind = {}
            for kind in dict.fromkeys([*low.by_kind, *high.by_kind]):
                less = low.by_kind[kind][a] if kind in low.by_kind else np.zeros(n, dtype=np.int64)
                more = high.by_kind[kind][partner] if kind in high.by_kind else np.zeros(n, dtype=np.int64)
                by_kind[kind] = more + (more - less) // (many - few) * (self.size[0] - many)
            deep.append((phase, by_kind))
        return self._with_inputs(peaks(deep), low, count)

    def _with_inputs(
        self, peaks: dict[str, dict[str, int]], timeline: MemoryTimeline, count: int
    ) -> dict[str, dict[str, int]]:
        """Add the batches of those micro-batches that were not traced: all are there from the step's begin on."""
        batches = timeline.by_kind.get("inputs")
        if batches is not None:
            for kinds in peaks.values():
                kinds["inputs"] = kinds.get("inputs", 0) + int(batches.max()) // count * (self.size[1] - count)
        return peaks

    def holds(self) -> dict[str, float]:
        """Return what the engine holds between the backward pass and the update, in bytes."""
        # Not a straight line in micro-batches: gradients are summed up where they are.
        count = max(count for _, count in self.traces)
        depths = {layers: dict(trace.holds) for (layers, c), trace in self.traces.items() if c == count}
        return _line(depths, self.size[0])

    def traffic(self, node_size: int) -> list[Traffic]:
        """Return the collectives of a step, those with the most bytes first.

        Args:
            node_size: Consecutive ranks that share a machine.
        """

        def calls(trace: Trace) -> Mapping[_Group, float]:
            return Counter(_group(operator, node_size) for operator in trace.collectives)

        def total(of: Callable[[Operator], float]) -> dict[_Group, float]:
            def by_group(trace: Trace) -> Mapping[_Group, float]:
                found: dict[_Group, float] = {}
                for operator in trace.collectives:
                    group = _group(operator, node_size)
                    found[group] = found.get(group, 0) + of(operator)
                return found

            return self.quantities(by_group)

        all_calls, all_sent = self.quantities(calls), total(lambda operator: operator.sent)
        all_between = total(lambda operator: _leaving(operator, node_size))
        found = [Traffic(*group, all_calls[group], all_sent[group], all_between[group]) for group in all_calls]
        return sorted(found, key=lambda traffic: -traffic.sent)


def middle_of_layers(few: list[str], many: list[str]) -> int:
    """Return the middle of the part of a pass that is the same in a deeper model, seen from its beginning and its end.

    That part is the layers. What the head does to long samples may be more than half of a pass.

    Args:
        few: Names of the operators of the pass.
        many: Those of the deeper model's.
    """
    n = len(few)
    alike = min(n, len(many))
    from_start = next((i for i in range(alike) if few[i] != many[i]), alike)
    from_end = next((i for i in range(alike) if few[-1 - i] != many[-1 - i]), alike)
    first = n - from_end
    return (first + from_start) // 2 if first < from_start else n // 2


def _group(operator: Operator, node_size: int) -> _Group:
    nodes = {rank // node_size for rank in operator.group}
    return collective_kind(operator.name.split(".")[1]), len(operator.group), len(nodes)


def _leaving(operator: Operator, node_size: int) -> float:
    """Return the bytes of a collective that leave a machine, on average over the processes; see `Traffic.between`."""
    kind, ranks, nodes = _group(operator, node_size)
    if nodes == 1:
        return 0.0
    if kind == "all-to-all":
        return sum(operator.leaving(node_size)) / ranks
    return operator.sent / max(1, ranks // nodes)


def _line(values: Mapping[int, Mapping[K, float]], at: int) -> dict[K, float]:
    """Return the values at `at`, of one or two that are known."""
    (few, less), (many, more) = min(values.items()), max(values.items())
    if few == many:
        return dict(less)
    slope = {key: (more.get(key, 0) - less.get(key, 0)) / (many - few) for key in dict.fromkeys([*less, *more])}
    return {key: more.get(key, 0) + slope[key] * (at - many) for key in slope}


def period(settings: EngineSettings, *, memory_only: bool = False) -> int:
    """Return after how many layers a model repeats itself.

    Sliding and full attention take the same memory, unless processes share the sequences.
    """
    kinds = settings.model.attention_types
    alike = next(n for n in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds, kinds[n:])))
    if memory_only and settings.parallel.context_parallel == 1:
        alike = 1
    # A single layer is the first and the last at once, which no other is.
    return max(2, math.lcm(alike, settings.train.activation_checkpointing or 1))


def trace_model(settings: EngineSettings, workload: Workload, *, in_full: bool = False) -> TracedStep:
    """Trace a step of all layers and micro-batches, or of as few as tell the rest.

    Args:
        settings: What the engine reads of the configuration.
        workload: What the process is given.
        in_full: Trace them all, which takes seconds to minutes where few take one.

    Raises:
        ValueError: As `trace_step`.
    """
    layers, count = settings.model.num_hidden_layers, settings.train.gradient_accumulation
    repeats = period(settings, memory_only=workload.memory_only)
    begun = layers % repeats  # of a period that is not complete, which shallow models must have too
    depths = [repeats + begun, 2 * repeats + begun]
    if in_full or layers <= depths[1] or _gathers_by_size(settings, depths[1]):
        depths = [layers]
    counts = [count] if in_full or count <= 2 else [1, 2]
    if workload.memory_only and workload.world_size == 1:  # nothing but peaks is asked for, and they are the second's
        counts = counts[-1:]
    traces = {(n, c): trace_step(_resized(settings, n, c), workload) for n in depths for c in counts}
    return TracedStep((layers, count), traces, {size: memory_timeline(trace) for size, trace in traces.items()})


def _gathers_by_size(settings: EngineSettings, layers: int) -> bool:
    """Return whether ZeRO 3 would leave a model of so few layers gathered, and not the whole one."""
    if engine_kind(settings.engine) != "deepspeed" or zero_stage(settings.engine) < 3:
        return False
    shallow, whole = (
        count_parameters(_resized(settings, n, 1).model).total for n in (layers, settings.model.num_hidden_layers)
    )
    return shallow < ZERO3_GATHERED < whole


def _resized(settings: EngineSettings, layers: int, micro_batches: int) -> EngineSettings:
    kinds = settings.model.layer_types
    model = dataclasses.replace(
        settings.model, num_hidden_layers=layers, layer_types=None if kinds is None else kinds[:layers]
    )
    train = dataclasses.replace(settings.train, gradient_accumulation=micro_batches)
    return dataclasses.replace(settings, model=model, train=train)
