"""Tensors in safetensors files, read and written in parts: nobody needs room for a whole one."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from data_pipeline.disk import sync_file
from data_pipeline.foreign import file_inside, read_json
from gptoss_dist.checkpoint.boxes import Box
from gptoss_dist.checkpoint.formats.headers import check_headers

INDEX = "model.safetensors.index.json"
PART_BYTES = 32 << 20
"""How much is read or converted at a time."""
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}

Slices = tuple[slice, ...]
"""The place of a box in a tensor: a slice with start and stop for each dimension."""


class LazyTensor(ABC):
    """A tensor that can be read in parts."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def read(self, slices: Slices) -> Tensor:
        """Return the values at `slices`.

        Raises:
            ValueError: The file is damaged.
        """

    def parts(self, slices: Slices | None = None, limit: int = PART_BYTES) -> Iterator[tuple[Slices, Tensor]]:
        """Yield the values at `slices`, a part at a time.

        Args:
            slices: All of the tensor by default.
            limit: No part takes more bytes than this in float32, unless one row of the last dimension does.

        Yields:
            The place of each part in the tensor, and its values.
        """
        slices = tuple(slice(0, n) for n in self.shape) if slices is None else slices
        for part in split(slices, limit):
            yield part, self.read(part)


def split(slices: Slices, limit: int) -> Iterator[Slices]:
    """Cut `slices` along its first dimensions into boxes of at most `limit` bytes in float32, in row-major order."""
    lengths = [s.stop - s.start for s in slices]
    if 4 * math.prod(lengths) <= limit or len(slices) <= 1:
        yield slices
        return
    row = 4 * math.prod(lengths[1:])
    rows = max(1, limit // row) if row else lengths[0]
    for start in range(slices[0].start, slices[0].stop, rows):
        head = slice(start, min(start + rows, slices[0].stop))
        if row <= limit:
            yield (head, *slices[1:])
        else:
            for tail in split(slices[1:], limit):
                yield (head, *tail)


class Held(LazyTensor):
    """A tensor in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape, self.dtype = tensor.detach(), tuple(tensor.shape), tensor.dtype

    def read(self, slices: Slices) -> Tensor:
        """Return a part of the tensor, on the CPU."""
        return self.tensor[slices].cpu()


class Stored(LazyTensor):
    """A tensor in safetensors files, possibly in several rectangular parts."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self.places: list[tuple[Path, str, tuple[int, ...], tuple[int, ...]]] = []
        """The file of each part, its name there, its offset in the whole tensor and its sizes."""

    def read(self, slices: Slices) -> Tensor:
        """Read a part from the files that hold it."""
        values = torch.empty([s.stop - s.start for s in slices], dtype=self.dtype)
        missing = values.numel()
        for path, name, offset, sizes in self.places:
            common = [slice(max(s.start, o), min(s.stop, o + n)) for s, o, n in zip(slices, offset, sizes, strict=True)]
            if any(s.start >= s.stop for s in common):
                continue
            try:
                # Opened for each part: what was read counts as this process's memory until the file is closed.
                with safe_open(path, "pt") as file:
                    part = file.get_slice(name)[tuple(slice(s.start - o, s.stop - o) for s, o in zip(common, offset))]
                    values[tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(common, slices))] = part
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path}: {name} cannot be read: {error}") from None
            missing -= part.numel()
        if missing:
            raise ValueError(f"{missing} values of a tensor of shape {self.shape} are in none of its files")
        return values


def stored_tensors(folder: str | Path, message: Callable[[str], None] = lambda line: None) -> dict[str, Stored]:
    """Return the tensors of a training checkpoint, or of a folder as Hugging Face's libraries write them, by name.

    Args:
        folder: The folder.
        message: Gets a line about files beside an index that it does not name, which are not read.

    Raises:
        ValueError: There are none, a file is damaged, two files hold the same tensor, or the index names what is not
            there.
    """
    folder = Path(folder)
    listed = _indexed_files(folder)
    paths, stray = sorted(folder.glob("*.safetensors")), []
    if named := set(listed.values()):
        stray = [path for path in paths if path.name not in named]
        paths = [path for path in paths if path.name in named]
    check_headers(folder, paths)
    whole = _whole_tensors(paths)
    if stray:
        message(f"{folder}: {', '.join(path.name for path in stray[:5])} is not in {INDEX} and is not read")
        tensors = whole
    else:
        tensors = _stored_in_parts(folder)
    if not tensors:
        raise ValueError(f"{folder} holds no safetensors file")
    wrong = [n for n, file in listed.items() if n not in tensors or tensors[n].places[0][0].name != file]
    if wrong:
        raise ValueError(f"{folder / INDEX}: {wrong[0]} and {len(wrong) - 1} more are not in the files it names")
    return tensors


def _whole_tensors(paths: list[Path]) -> dict[str, Stored]:
    """Return the tensors of files each of which holds all of its tensors' values; others are opened all the same."""
    tensors: dict[str, Stored] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                if "DCP_SHARDING_INFO" in (file.metadata() or {}):
                    continue
                for name in sorted(file.keys()):
                    part = file.get_slice(name)
                    shape = tuple(part.get_shape())
                    if name in tensors:
                        raise ValueError(
                            f"{name} is in {tensors[name].places[0][0].name} and in {path.name} of {path.parent}"
                        )
                    dtype = part[:0].dtype if shape else file.get_tensor(name).dtype
                    tensors[name] = Stored(shape, dtype)
                    tensors[name].places.append((path, name, (0,) * len(shape), shape))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    return tensors


def _stored_in_parts(folder: Path) -> dict[str, Stored]:
    """Return the tensors of all files of a folder, which may hold a part of a tensor each."""
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata()
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{folder} cannot be read: {' '.join(str(error).split())[:300]}") from None
    tensors = {}
    for name, entry in found.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), name  # safetensors hold nothing else
        tensors[name] = Stored(entry.size, entry.properties.dtype)
    for index, place in found.storage_data.items():
        offset = tuple(index.offset or (0,) * len(place.shape))
        tensors[index.fqn].places.append((Path(place.relative_path), index.fqn, offset, tuple(place.shape)))
    return tensors


def _indexed_files(folder: Path) -> dict[str, str]:
    """Return {tensor: file} of the index, empty if there is no index."""
    path = folder / INDEX
    if not os.path.lexists(path):
        return {}
    listed = read_json(file_inside(folder, INDEX), _Index).weight_map
    for file in set(listed.values()):
        file_inside(folder, file)
    return listed


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class Output(NamedTuple):
    """Tensors to be written that are made together."""

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """The shape and dtype of each, by name."""
    parts: Iterable[dict[str, Tensor]]
    """Their values in row-major order, a part of some or all of them at a time."""

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take in a file."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors.values())


def write_tensors(folder: Path, outputs: list[Output], *, file_bytes: int, stem: str = "model") -> list[Path]:
    """Write safetensors files, and their index if there are several.

    They are named as Hugging Face's libraries name them: `model-00001-of-00003.safetensors`. The writer of safetensors
    wants all tensors of a file in memory; this one holds a part at a time.

    Args:
        folder: An existing folder.
        outputs: What to write, in this order.
        file_bytes: The largest size of a file, unless a single `Output` is larger.
        stem: How the files' names begin.

    Returns:
        The paths of all files, the index last.
    """
    groups: list[list[Output]] = []
    size = 0
    for output in outputs:
        if not groups or size + output.nbytes > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.nbytes
    paths: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        _write_file(folder / name, group)
        paths.append(folder / name)
        weight_map |= {tensor: name for output in group for tensor in output.tensors}
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(o.nbytes for o in outputs)}, "weight_map": weight_map}
        path = folder / f"{stem}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=1) + "\n")
        paths.append(path)
    return paths


def write_boxes(folder: Path, stem: str, parts: Mapping[str, tuple[Sequence[int], list[Box]]]) -> list[Path]:
    """Write parts of tensors, with their places, as torch DCP's reader of safetensors expects them.

    A file holds one value per name: the n-th boxes of all tensors go to the n-th file.
    """
    paths = []
    for number in range(max((len(boxes) for _, boxes in parts.values()), default=0)):
        chosen = {name: boxes[number] for name, (_, boxes) in parts.items() if len(boxes) > number}
        outputs = [
            Output({name: (tuple(box.values.shape), box.values.dtype)}, [{name: box.values}])
            for name, box in chosen.items()
        ]
        places = {name: {"saved_offsets": list(box.offset)} for name, box in chosen.items()}
        paths.append(folder / (f"{stem}_{number}.safetensors" if number else f"{stem}.safetensors"))
        _write_file(paths[-1], outputs, {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)})
    return paths


def _write_file(path: Path, group: list[Output], metadata: Mapping[str, str] | None = None) -> None:
    """Write one file: the header's length, the header in JSON, the bytes of the tensors.

    The format is that of https://github.com/huggingface/safetensors.
    """
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for output in group:
        for name, (shape, dtype) in output.tensors.items():
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        begin = file.tell()
        for output in group:
            written = dict.fromkeys(output.tensors, 0)
            for part in output.parts:
                for name, values in part.items():
                    assert values.dtype == output.tensors[name][1], name
                    file.seek(begin + header[name]["data_offsets"][0] + written[name])
                    data = values.contiguous().view(-1).view(torch.uint8).numpy()
                    file.write(data.data)
                    written[name] += data.nbytes
            for name, count in written.items():
                first, end = header[name]["data_offsets"]
                assert count == end - first, f"{name}: {count} bytes instead of {end - first}"
        sync_file(file)
