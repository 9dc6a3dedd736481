"""What `torch.compile` does to a trace, simply: runs of elementwise operators become one.

The trace is of the eager step. Between matrix products, attention, gathers and collectives, inductor makes one kernel
of what is elementwise or reduces, which reads what comes from outside once and writes what is used later. That is all
that is modelled: one kernel per run of such operators. Fusion into matrix products, and kernels that inductor splits,
are not. It serves GPUs, where the bytes decide; on a CPU exponentials would be priced as if they were copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from gptoss_dist.planner.timing.kinds import Kind, kind_of
from gptoss_dist.planner.tracing.recorder import Operator

FUSED = (Kind.MEMORY, Kind.EXPONENTIAL)


def fuse(operators: list[Operator]) -> list[Operator]:
    """Return the operators with each run of elementwise ones of the forward and backward pass replaced by one."""
    last_use = {storage: index for index, operator in enumerate(operators) for storage in operator.inputs}
    fused: list[Operator] = []
    run: list[tuple[int, Operator]] = []
    for index, operator in enumerate(operators):
        kind = kind_of(operator)
        if kind in FUSED and operator.phase != "update" and operator.name.startswith("aten."):
            run.append((index, operator))
        elif kind is not Kind.NOTHING:
            fused += _as_one(run, last_use)
            fused.append(operator)
            run = []
    return fused + _as_one(run, last_use)


def _as_one(run: list[tuple[int, Operator]], last_use: dict[int, int]) -> list[Operator]:
    if len(run) < 2:
        return [operator for _, operator in run]
    end, first = run[-1][0], run[0][1]
    made: set[int] = set()
    read: dict[int, float] = {}
    written: dict[int, float] = {}
    for _, operator in run:
        for storage, size in zip(operator.inputs, _sizes(operator), strict=False):
            if storage not in made:
                read[storage] = max(read.get(storage, 0), size)
        for storage in operator.outputs:
            made.add(storage)
            if last_use.get(storage, math.inf) > end:
                written[storage] = max(written.get(storage, 0), operator.written / len(operator.outputs))
    return [
        Operator(
            "aten.fused.default",
            first.phase,
            0,
            int(sum(read.values())),
            int(sum(written.values())),
            first.dtype,
            max((operator.shapes for _, operator in run), key=lambda shapes: sum(map(math.prod, shapes))),
            tuple(read),
            tuple(made),
        )
    ]


def _sizes(operator: Operator) -> Iterable[float]:
    """Return the bytes of each operand; all have as many bytes per number as they have on the average."""
    numbers = [math.prod(shape) for shape in operator.shapes]
    width = operator.read / max(1, sum(numbers))
    return [count * width for count in numbers]
