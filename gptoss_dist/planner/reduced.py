"""A deep model's step from two shallow ones: layers repeat, so what a step needs is a straight line in their number.

Layers alternate between sliding and full attention, and every n-th is checkpointed: after lcm(2, n) of them all is as
before. Models of one and of two such periods are traced, and every quantity of the deep one, such as the bytes of one
kind of memory or of one kind of collective, is read off the line through both:

    layers    2          4                        24
    bytes     b          b + one period           b + 11 periods

The real trace of all layers is there for whoever has the time (`trace_step`); `tests/planner/test_reduced.py` compares.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from gptoss_dist.engine import EngineSettings
from gptoss_dist.planner.memory import MemoryTimeline, memory_timeline, peaks
from gptoss_dist.planner.tracing.recorder import collective_kind
from gptoss_dist.planner.tracing.trace import Trace, Workload, trace_step

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Traffic:
    """One kind of collective over one group of processes, in one step of one process."""

    kind: str
    """Such as `all-gather`."""
    ranks: int
    """Processes that take part."""
    spans_nodes: bool
    """Whether they sit on more than one machine."""
    calls: float
    sent: float
    """Bytes that this process sends, by the ring model."""


@dataclass(frozen=True)
class TracedStep:
    """A step of a model of `layers` layers, from traces of models of as many or fewer."""

    layers: int
    traces: dict[int, Trace]
    """By number of layers; one, or two to draw a line through."""
    timelines: dict[int, MemoryTimeline]

    @property
    def whole(self) -> Trace | None:
        """The trace of all layers, if that is what was traced."""
        return self.traces.get(self.layers)

    def quantity(self, of: Callable[[Trace], float]) -> float:
        """Return a quantity of the step that is a straight line in the number of layers."""
        return self._line({layers: {None: of(trace)} for layers, trace in self.traces.items()})[None]

    def peaks(self) -> dict[str, dict[str, int]]:
        """Return, for each phase, the bytes by kind at its instant with the most of them.

        Where that instant lies may depend on the number of layers. So the line is drawn for every instant of the
        shallower model, with that of the deeper one that is as far from the beginning of the same pass, or, in the
        second half of the pass, as far from its end. Between the layers near both ends nothing is higher: from layer
        to layer memory grows, or shrinks, evenly.
        """
        few, many = min(self.timelines), max(self.timelines)
        if few == many:
            return self.timelines[few].peaks()
        low, high = self.timelines[few], self.timelines[many]
        deep = []
        for (phase, a), (same, b) in zip(low.passes(), high.passes(), strict=True):
            assert phase == same
            n, m = a.stop - a.start, b.stop - b.start
            instants = np.arange(n)
            partner = b.start + np.where(instants < n // 2, instants, m - n + instants)
            by_kind = {}
            for kind in dict.fromkeys([*low.by_kind, *high.by_kind]):
                less = low.by_kind[kind][a] if kind in low.by_kind else np.zeros(n, dtype=np.int64)
                more = high.by_kind[kind][partner] if kind in high.by_kind else np.zeros(n, dtype=np.int64)
                by_kind[kind] = more + (more - less) // (many - few) * (self.layers - many)
            deep.append((phase, by_kind))
        return peaks(deep)

    def holds(self) -> dict[str, float]:
        """Return what the engine holds between the backward pass and the update, in bytes."""
        return self._line({layers: trace.holds for layers, trace in self.traces.items()})

    def traffic(self, node_size: int) -> list[Traffic]:
        """Return the collectives of a step, those with the most bytes first.

        Args:
            node_size: Consecutive ranks that share a machine.
        """
        calls: dict[int, dict[tuple, float]] = {layers: {} for layers in self.traces}
        sent: dict[int, dict[tuple, float]] = {layers: {} for layers in self.traces}
        for layers, trace in self.traces.items():
            for operator in trace.collectives:
                nodes = {rank // node_size for rank in operator.group}
                kind = collective_kind(operator.name.split(".")[1])
                key = (kind, len(operator.group), len(nodes) > 1)
                calls[layers][key] = calls[layers].get(key, 0) + 1
                sent[layers][key] = sent[layers].get(key, 0) + operator.sent
        all_calls, all_sent = self._line(calls), self._line(sent)
        found = [Traffic(*key, all_calls[key], all_sent[key]) for key in all_calls]
        return sorted(found, key=lambda traffic: -traffic.sent)

    def _line(self, values: dict[int, dict[K, float]]) -> dict[K, float]:
        (few, less), (many, more) = min(values.items()), max(values.items())
        keys = dict.fromkeys([*less, *more])
        if few == many:
            return dict(less)
        slope = {key: (more.get(key, 0) - less.get(key, 0)) / (many - few) for key in keys}
        return {key: more.get(key, 0) + slope[key] * (self.layers - many) for key in keys}


def period(settings: EngineSettings) -> int:
    """Return after how many layers a model repeats itself."""
    return math.lcm(2, settings.train.activation_checkpointing or 1)


def trace_model(settings: EngineSettings, workload: Workload, *, all_layers: bool = False) -> TracedStep:
    """Trace a step of all layers, or of as few as tell the rest.

    Args:
        settings: What the engine reads of the configuration.
        workload: What the process is given.
        all_layers: Trace them all, which takes seconds where few take one.

    Raises:
        ValueError: As `trace_step`.
    """
    layers, step = settings.model.num_hidden_layers, period(settings)
    depths = [layers] if all_layers or layers <= 2 * step else [step, 2 * step]
    traces = {depth: trace_step(_with_layers(settings, depth), workload) for depth in depths}
    return TracedStep(layers, traces, {depth: memory_timeline(trace) for depth, trace in traces.items()})


def _with_layers(settings: EngineSettings, layers: int) -> EngineSettings:
    kinds = settings.model.layer_types
    model = dataclasses.replace(
        settings.model, num_hidden_layers=layers, layer_types=None if kinds is None else kinds[:layers]
    )
    return dataclasses.replace(settings, model=model)
