"""A plan as a picture: memory over the step, stacked by what it is for, and the time line of its streams."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.disk import replacing
from gptoss_dist.planner.plan import Plan
from gptoss_dist.planner.timing.roofline import Event
from gptoss_dist.planner.tracing.memory import KINDS, MemoryTimeline

GIB = 2**30
COLOURS = {
    "weights": "#4c72b0",
    "optimizer": "#8da0cb",
    "gradients": "#dd8452",
    "gathered weights": "#55a868",
    "gradient buffers": "#e5ae38",
    "all-to-all buffers": "#8172b3",
    "head": "#c44e52",
    "activations": "#937860",
    "temporary": "#bbbbbb",
    "inputs": "#333333",
}
_MAX_POINTS = 2000


def draw(plan: Plan, file: Path) -> None:
    """Draw a plan into a PNG file.

    Args:
        plan: A plan that was traced in full.
        file: Where to.

    Raises:
        ValueError: The plan was traced in part, so that its time line is that of a smaller model.
    """
    from matplotlib.figure import Figure

    if plan.step.size not in plan.step.timelines:
        raise ValueError("a picture needs a plan that was traced in full; give --in-full")
    figure = Figure(figsize=(12, 7), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3, 1])
    _draw_memory(above, plan.step.timelines[plan.step.size], plan)
    if plan.time is not None:
        _draw_streams(below, plan.time.events)
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _draw_memory(axes, timeline: MemoryTimeline, plan: Plan) -> None:
    every = max(1, len(timeline.phases) // _MAX_POINTS)
    # Of each bin the instant with the most bytes, so that no peak is lost.
    total = timeline.total
    bins = [start + int(total[start : start + every].argmax()) for start in range(0, len(total), every)]
    kinds = [kind for kind in KINDS if kind in timeline.by_kind]
    layers = np.array([timeline.by_kind[kind][bins] for kind in kinds]) / GIB
    axes.stackplot(bins, layers, labels=kinds, colors=[COLOURS[kind] for kind in kinds], linewidth=0)
    for phase, part in timeline.passes():
        axes.axvline(part.start, color="black", linewidth=0.5)
        axes.text(part.start, axes.get_ylim()[1], f" {phase}", va="top", fontsize=8)
    if plan.machines.limit is not None:
        axes.axhline(plan.machines.limit / GIB, color="red", linewidth=1, linestyle="--", label="memory of the device")
    axes.set(xlabel="operator of the step", ylabel="GiB of one process", title=plan.machines.name)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)


def _draw_streams(axes, events: list[Event]) -> None:
    streams = list(dict.fromkeys(event.stream for event in events))
    for row, stream in enumerate(streams):
        spans = [(event.start, event.end - event.start) for event in events if event.stream == stream]
        axes.broken_barh(spans, (row - 0.4, 0.8), color="#4c72b0" if row == 0 else "#dd8452", linewidth=0)
    axes.set(xlabel="seconds", yticks=range(len(streams)), yticklabels=streams)
