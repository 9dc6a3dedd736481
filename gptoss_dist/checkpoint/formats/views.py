"""The forms in which published checkpoints hold a tensor of the model, each readable in parts.

Shapes: E experts, O outputs, I inputs; the model's own expert weights are [E, I, O].
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gptoss_dist.checkpoint.formats.tensor_files import Output, Region, Source, split
from gptoss_dist.ops.mxfp4 import GROUP, Mxfp4, decode, encode


class Rows(Source):
    """Some rows of a tensor, as q, k and v are of a fused projection."""

    def __init__(self, source: Source, start: int, stop: int) -> None:
        self.source, self.start, self.dtype = source, start, source.dtype
        self.shape = (max(0, min(stop, source.shape[0]) - start), *source.shape[1:])

    def read(self, box: Region) -> Tensor:
        rows = slice(box[0].start + self.start, box[0].stop + self.start)
        return self.source.read((rows, *box[1:]))


class Concatenated(Source):
    """Tensors below each other."""

    def __init__(self, sources: list[Source]) -> None:
        self.sources, self.dtype = sources, sources[0].dtype
        self.shape = (sum(s.shape[0] for s in sources), *sources[0].shape[1:])

    def read(self, box: Region) -> Tensor:
        found, first = [], 0
        for source in self.sources:
            start, stop = max(box[0].start - first, 0), min(box[0].stop - first, source.shape[0])
            if start < stop:
                found.append(source.read((slice(start, stop), *box[1:])))
            first += source.shape[0]
        return torch.cat(found)


class Transposed(Source):
    """[E, A, B] as [E, B, A]."""

    def __init__(self, source: Source) -> None:
        self.source, self.dtype = source, source.dtype
        self.shape = (source.shape[0], source.shape[2], source.shape[1])

    def read(self, box: Region) -> Tensor:
        return self.source.read((box[0], box[2], box[1])).transpose(1, 2)


class Packed(Source):
    """MXFP4 blocks [E, O, I / 32, 16] and scales [E, O, I / 32] as [E, I, O].

    torch's own reader of this form loads the first columns only and reports nothing (2.13).
    """

    dtype = torch.bfloat16

    def __init__(self, blocks: Source, scales: Source) -> None:
        self.blocks, self.scales = blocks, scales
        self.shape = (blocks.shape[0], blocks.shape[2] * GROUP, blocks.shape[1])

    def read(self, box: Region) -> Tensor:
        experts, inputs, outputs = box
        groups = slice(inputs.start // GROUP, math.ceil(inputs.stop / GROUP))
        packed = (experts, outputs, groups)
        blocks_EOGB = self.blocks.read((*packed, slice(0, GROUP // 2)))
        values_EOI = decode(Mxfp4(blocks_EOGB, self.scales.read(packed)), self.dtype)
        first = groups.start * GROUP
        return values_EOI[..., inputs.start - first : inputs.stop - first].transpose(1, 2)


def plain(name: str, source: Source, dtype: torch.dtype) -> Output:
    """`source` to be written as it is."""
    parts = ({name: values.to(dtype)} for _, values in source.parts())
    return Output({name: (source.shape, dtype)}, parts)


class Losses(dict[str, float]):
    """Relative quantisation error of each packed tensor: norm of what was lost over norm of the tensor."""


def packed(blocks: str, scales: str, source: Source, losses: Losses, *, search: bool) -> Output:
    """`source`, [E, O, I], to be written in MXFP4.

    Args:
        losses: gets an entry named `blocks` when the parts have been made.
        search: as in `ops.mxfp4.encode`.
    """
    experts, outputs, inputs = source.shape

    def parts() -> Iterator[dict[str, Tensor]]:
        lost, whole = 0.0, 0.0
        for box in split((slice(0, experts), slice(0, outputs), slice(0, inputs)), limit=16 << 20):
            values = source.read(box).contiguous()
            made = encode(values, search=search)
            values = values.float()
            lost += float((decode(made) - values).square().sum(dtype=torch.float64))
            whole += float(values.square().sum(dtype=torch.float64))
            yield {blocks: made.blocks, scales: made.scales}
        losses[blocks] = math.sqrt(lost / whole) if whole else 0.0

    shape = (experts, outputs, inputs // GROUP)
    return Output({blocks: ((*shape, GROUP // 2), torch.uint8), scales: (shape, torch.uint8)}, parts())
