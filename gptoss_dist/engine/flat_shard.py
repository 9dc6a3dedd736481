"""A run of a parameter's elements, as ZeRO shards it, in a form that torch DCP writes and reads.

ZeRO cuts parameters between any two elements. DCP deals in boxes: rectangular parts, each with an offset in the whole
tensor. A run of a row-major tensor with n dimensions is at most 2n - 1 boxes, so nobody needs the whole tensor to
save it or to load it. For example the elements 2 to 9 of a tensor of shape [4, 3] are three boxes:

    . . 2      the end of row 0:      offset (0, 2), shape [1, 1]
    3 4 5      rows 1 and 2, whole:   offset (1, 0), shape [2, 3]
    6 7 8
    9 . .      the start of row 3:    offset (3, 0), shape [1, 1]
"""

from __future__ import annotations

import math

from torch import Tensor

from gptoss_dist.checkpoint.boxes import Box, BoxedTensor


def boxes(run: Tensor, start: int, shape: tuple[int, ...]) -> list[Box]:
    """Cut `run` into boxes, in order.

    Args:
        run: One-dimensional, the elements from `start` on of a row-major tensor of `shape`.
    """
    if run.numel() == 0:
        return []
    if len(shape) <= 1:
        return [Box((start,) * len(shape), run.view(run.numel() if shape else ()))]
    row = math.prod(shape[1:])
    first, end = start // row, start + run.numel()
    if end <= (first + 1) * row:  # within one row
        return [_in_row(first, box) for box in boxes(run, start - first * row, shape[1:])]
    parts, position = [], 0
    if start > first * row:  # the end of a row
        position = (first + 1) * row - start
        parts += [_in_row(first, box) for box in boxes(run[:position], start - first * row, shape[1:])]
        first += 1
    rows = end // row - first
    if rows:
        whole = run[position : position + rows * row].view(rows, *shape[1:])
        parts.append(Box((first,) + (0,) * (len(shape) - 1), whole))
        position += rows * row
    return parts + [_in_row(first + rows, box) for box in boxes(run[position:], 0, shape[1:])]


def _in_row(index: int, box: Box) -> Box:
    """Return a box of row `index` as one of the tensor with all rows."""
    return Box((index, *box.offset), box.values[None])


def flat_shard(
    run: Tensor, start: int, shape: tuple[int, ...], *, whole: tuple[int, ...] | None = None, first: int = 0
) -> BoxedTensor:
    """Return what stands for a whole tensor of which this rank holds a run of elements.

    Args:
        run: One-dimensional. Writing to it is writing to the shard.
        start: The place of run[0] in the row-major tensor of `shape`.
        shape: The shape of the tensor that was cut.
        whole: The shape of a larger tensor, if the one that was cut is itself some of its rows.
        first: The first of those rows.
    """
    parts = [
        Box((box.offset[0] + first, *box.offset[1:]) if box.offset else (), box.values)
        for box in boxes(run, start, tuple(shape))
    ]
    return BoxedTensor(tuple(whole or shape), parts, run.dtype, run.device)
