"""Rectangular parts of tensors: what a rank holds of a sharded one, whichever engine shards it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class Box(NamedTuple):
    """A rectangular part of a tensor."""

    offset: tuple[int, ...]
    """The index of its first element in the whole tensor."""
    values: Tensor


class BoxedTensor(Tensor):
    """A whole tensor of which this rank holds only some boxes. Nobody but torch DCP can do anything with it."""

    boxes: list[Box]
    is_copy: bool = False
    """True if another rank holds the same boxes, and writes them."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], boxes: list[Box], dtype: torch.dtype, device: torch.device) -> BoxedTensor:
        """Make a tensor of the whole shape that has no memory but the boxes."""
        tensor = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)
        tensor.boxes = boxes
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:  # DCP's planner asks for it
            return args[0]
        raise TypeError(f"{function} needs the whole tensor; this rank holds only a part of its elements")

    # torch.distributed.checkpoint.planner_helpers looks for these three.

    def __create_write_items__(self, name: str, _) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, torch.Size(offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(offset, values), properties=TensorProperties(dtype=values.dtype), size=self.size()
                ),
            )
            for offset, values in self.boxes
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(offset, values) for offset, values in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(values for offset, values in self.boxes if torch.Size(offset) == index.offset)


def _chunk(offset: tuple[int, ...], values: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(offset), sizes=values.size())


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that are NaN or infinite in what this rank writes of them."""
    names, norms = [], []
    for name, tensor in state.items():
        for _, values in boxes_to_write(name, tensor) if tensor.is_floating_point() else ():
            if values.numel():
                names.append(name)
                norms.append(torch.linalg.vector_norm(values, torch.inf, dtype=torch.float32))  # needs no memory beside
    if not norms:
        return []
    device = norms[-1].device
    finite = torch.stack([norm.to(device, non_blocking=True) for norm in norms]).isfinite().tolist()
    return [name for name, is_finite in zip(names, finite) if not is_finite]


def boxes_to_write(name: str, tensor: Tensor) -> list[Box]:
    """Return the boxes of `tensor` that this rank writes. All ranks together write each element once.

    Where several ranks hold copies, the name of the tensor chooses the one that writes, so that the work is divided.
    """
    if isinstance(tensor, BoxedTensor):
        return [] if tensor.is_copy else tensor.boxes
    if not isinstance(tensor, DTensor):
        return [Box((0,) * tensor.dim(), tensor)] if not dist.is_initialized() or dist.get_rank() == 0 else []
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate() and coordinate[dim] != zlib.crc32(name.encode()) % mesh.size(dim):
            return []
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    return [Box(tuple(offset), tensor.to_local())] if math.prod(shape) else []
