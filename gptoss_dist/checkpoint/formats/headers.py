"""What the headers of a model's files say, compared with each other and with the configuration.

It is done before any memory is taken for values: a configuration or a header of a few bytes can speak of any size, but
the tensors of a file cannot be larger than the file, which safetensors checks. So where all sizes agree with tensors
that are there in full, nothing is allocated that is not there to be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open

from data_pipeline.foreign import Count, convert, file_inside, parse_json
from data_pipeline.printable import printable
from gptoss_dist.model.config import ModelConfig

_DTYPES = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "BOOL"}
_SHARDING = "DCP_SHARDING_INFO"
"""Where torch DCP notes which part of a tensor a file holds."""
_LAYER = "model.layers."


class _Place(msgspec.Struct):
    saved_offsets: list[Count]


def check_headers(folder: Path, paths: Iterable[Path]) -> None:
    """Check that safetensors files of a folder hold each tensor that they name once and in full.

    Args:
        folder: The folder.
        paths: The files in it that are going to be read together.

    Raises:
        ValueError: A file is damaged, no regular file of the folder, or of a kind that is not read; or parts of a
            tensor are missing or there twice. One line, which names the file.
    """
    ends: dict[str, list[int]] = {}
    counts: dict[str, int] = {}
    for path in sorted(paths):
        for name, shape, offset in _parts(file_inside(folder, path.name)):
            end = [first + size for first, size in zip(offset, shape)]
            if len(end) != len(ends.setdefault(name, end)):
                raise ValueError(f"{path}: {printable(name)} has {len(end)} dimensions, and others in another file")
            ends[name] = list(map(max, ends[name], end))
            counts[name] = counts.get(name, 0) + math.prod(shape)
    for name, end in ends.items():
        if counts[name] != math.prod(end):
            raise ValueError(
                f"{printable(folder)}: {counts[name]:,} values of {printable(name)} are in the files, its shape {end} "
                f"has {math.prod(end):,}; restore the files that belong together"
            )


def _parts(path: Path) -> list[tuple[str, list[int], list[int]]]:
    """Return name, shape and place in the whole of each tensor in a file."""
    try:
        with safe_open(path, "pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            found = {name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in names}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{printable(path)} is damaged: {printable(error)}; restore it from a good copy") from None
    for name, (_, dtype) in found.items():
        if dtype not in _DTYPES:
            raise ValueError(f"{printable(path)}: {printable(name)} is of type {dtype}, which is not read; convert it")
    if _SHARDING not in metadata:
        return [(name, shape, [0] * len(shape)) for name, (shape, _) in found.items()]
    origin = f"{path}: {_SHARDING}"
    places = convert(parse_json(metadata[_SHARDING], origin), dict[str, _Place], origin)
    for name, (shape, _) in found.items():
        if name not in places or len(places[name].saved_offsets) != len(shape):
            raise ValueError(f"{printable(origin)} has no place for {printable(name)}; restore the file")
    return [(name, shape, places[name].saved_offsets) for name, (shape, _) in found.items()]


def check_sizes(config: ModelConfig, shapes: Mapping[str, Sequence[int]], origin: object) -> None:
    """Compare the sizes of a configuration with the tensors, before a model of these sizes is built.

    Args:
        config: The architecture.
        shapes: The shapes of the tensors by the model's names. Those that are missing are not looked at.
        origin: The file of the configuration, for the message.

    Raises:
        ValueError: A size is not that of the tensors; one line that names it.
    """
    found = {name.removeprefix(_LAYER).partition(".")[0] for name in shapes if name.startswith(_LAYER)}
    layers = {int(number) for number in found if number.isdecimal()}
    if layers and config.num_hidden_layers != len(layers):
        raise ValueError(
            f"{printable(origin)}: num_hidden_layers={config.num_hidden_layers}, but its tensors are of {len(layers)} "
            "layers; correct it, or restore the files that belong together"
        )
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    D, E, I = config.hidden_size, config.num_local_experts, config.intermediate_size  # noqa: E741
    for name, keys, shape in (
        ("model.embed_tokens.weight", ("vocab_size", "hidden_size"), (config.vocab_size, D)),
        (_LAYER + "0.self_attn.q_proj.weight", ("num_attention_heads", "head_dim", "hidden_size"), (heads, D)),
        (_LAYER + "0.self_attn.k_proj.weight", ("num_key_value_heads", "head_dim", "hidden_size"), (kv_heads, D)),
        (_LAYER + "0.mlp.experts.down_proj", ("num_local_experts", "intermediate_size", "hidden_size"), (E, I, D)),
    ):
        if name in shapes and tuple(shapes[name]) != shape:
            said = ", ".join(f"{key}={getattr(config, key)}" for key in keys)
            raise ValueError(
                f"{printable(origin)}: {said} mean {list(shape)} for {name}, but it is "
                f"{list(shapes[name])}; correct them, or restore the files that belong together"
            )
