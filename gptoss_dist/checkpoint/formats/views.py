"""The forms in which published checkpoints hold a tensor of the model. Each can be read in parts.

Shapes: E experts, O outputs, I inputs; the model's own expert weights are [E, I, O].
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gptoss_dist.checkpoint.formats.tensor_files import LazyTensor, Output, Slices, split
from gptoss_dist.ops.mxfp4 import GROUP, Mxfp4, decode, encode


class Rows(LazyTensor):
    """Some rows of a tensor, as q, k and v are of a fused projection."""

    def __init__(self, tensor: LazyTensor, start: int, stop: int) -> None:
        self.tensor, self.start, self.dtype = tensor, start, tensor.dtype
        self.shape = (max(0, min(stop, tensor.shape[0]) - start), *tensor.shape[1:])

    def read(self, slices: Slices) -> Tensor:
        """Read those of the rows."""
        rows = slice(slices[0].start + self.start, slices[0].stop + self.start)
        return self.tensor.read((rows, *slices[1:]))


class Concatenated(LazyTensor):
    """Several tensors below each other, as one."""

    def __init__(self, tensors: list[LazyTensor]) -> None:
        self.tensors, self.dtype = tensors, tensors[0].dtype
        self.shape = (sum(s.shape[0] for s in tensors), *tensors[0].shape[1:])

    def read(self, slices: Slices) -> Tensor:
        """Read from the parts that the slices touch."""
        found, first = [], 0
        for tensor in self.tensors:
            start, stop = max(slices[0].start - first, 0), min(slices[0].stop - first, tensor.shape[0])
            if start < stop:
                found.append(tensor.read((slice(start, stop), *slices[1:])))
            first += tensor.shape[0]
        return torch.cat(found)


class Transposed(LazyTensor):
    """A tensor [E, A, B] as [E, B, A]."""

    def __init__(self, tensor: LazyTensor) -> None:
        self.tensor, self.dtype = tensor, tensor.dtype
        self.shape = (tensor.shape[0], tensor.shape[2], tensor.shape[1])

    def read(self, slices: Slices) -> Tensor:
        """Read the transpose of each expert."""
        return self.tensor.read((slices[0], slices[2], slices[1])).transpose(1, 2)


class Packed(LazyTensor):
    """MXFP4 blocks [E, O, I / 32, 16] and scales [E, O, I / 32] as a tensor [E, I, O].

    torch's own reader of this form loads the first columns only and reports nothing (2.13).
    """

    dtype = torch.bfloat16

    def __init__(self, blocks: LazyTensor, scales: LazyTensor) -> None:
        self.blocks, self.scales = blocks, scales
        self.shape = (blocks.shape[0], blocks.shape[2] * GROUP, blocks.shape[1])

    def read(self, slices: Slices) -> Tensor:
        """Decode the values at the slices."""
        experts, inputs, outputs = slices
        groups = slice(inputs.start // GROUP, math.ceil(inputs.stop / GROUP))
        packed = (experts, outputs, groups)
        blocks_EOGB = self.blocks.read((*packed, slice(0, GROUP // 2)))
        values_EOI = decode(Mxfp4(blocks_EOGB, self.scales.read(packed)), self.dtype)
        first = groups.start * GROUP
        return values_EOI[..., inputs.start - first : inputs.stop - first].transpose(1, 2)


def plain(name: str, tensor: LazyTensor, dtype: torch.dtype) -> Output:
    """Return `tensor` as what is to be written in `dtype` and is otherwise unchanged."""
    parts = ({name: values.to(dtype)} for _, values in tensor.parts())
    return Output({name: (tensor.shape, dtype)}, parts)


class Losses(dict[str, float]):
    """The relative quantisation error of each packed tensor: norm of what was lost over norm of the tensor."""


def packed(blocks: str, scales: str, tensor: LazyTensor, losses: Losses, *, search: bool) -> Output:
    """Return `tensor`, [E, O, I], as what is to be written in MXFP4.

    Args:
        blocks: The name of the blocks in the file.
        scales: The name of the scales.
        losses: It gets an entry named `blocks` when the parts have been made.
        search: As in `ops.mxfp4.encode`.
    """
    experts, outputs, inputs = tensor.shape

    def parts() -> Iterator[dict[str, Tensor]]:
        lost, whole = 0.0, 0.0
        for slices in split((slice(0, experts), slice(0, outputs), slice(0, inputs)), limit=16 << 20):
            values = tensor.read(slices).contiguous()
            made = encode(values, search=search)
            values = values.float()
            lost += float((decode(made) - values).square().sum(dtype=torch.float64))
            whole += float(values.square().sum(dtype=torch.float64))
            yield {blocks: made.blocks, scales: made.scales}
        losses[blocks] = math.sqrt(lost / whole) if whole else 0.0

    shape = (experts, outputs, inputs // GROUP)
    return Output({blocks: ((*shape, GROUP // 2), torch.uint8), scales: (shape, torch.uint8)}, parts())
