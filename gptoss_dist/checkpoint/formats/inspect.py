"""A description of what is in a checkpoint, for people."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import yaml

from gptoss_dist.checkpoint.formats.pretrained import open_pretrained
from gptoss_dist.checkpoint.formats.tensor_files import LazyTensor, stored_tensors
from gptoss_dist.checkpoint.info import read_info


def describe(where: str | Path, *, values: bool = True) -> str:
    """Describe step, format, sizes and settings, and each tensor in a line with its dtype, shape and number of parts.

    Args:
        where: As for `open_pretrained`.
        values: Read all tensors, and name those with values that are not finite.

    Raises:
        ValueError: As `open_pretrained`.
    """
    pretrained = open_pretrained(where, verify=False)
    lines = [f"{pretrained.folder}"]
    if pretrained.format == "run":
        info = read_info(pretrained.folder)
        tensors: Mapping[str, LazyTensor] = stored_tensors(pretrained.folder)
        config = info.pop("config")
        files = info.pop("files", {})
        lines += [f"  {key}: {value}" for key, value in info.items()]
        lines += [f"  {name}: {entry['bytes']:,} bytes" for name, entry in files.items()]
        settings = {key: value for key, value in config.items() if key != "model"}
        lines += ["settings", *_indented(yaml.safe_dump(settings, sort_keys=False))]
    else:
        tensors = pretrained.tensors
        lines.append(f"  format: {pretrained.format}")
    lines += ["architecture", *_indented(yaml.safe_dump(pretrained.config.to_dict(), sort_keys=False))]
    kinds: dict[str, int] = defaultdict(int)
    lines.append("tensors")
    wrong = {name: count for name, tensor in tensors.items() if (count := _not_finite(tensor))} if values else {}
    for name, tensor in sorted(tensors.items()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        parts = len(getattr(tensor, "places", ())) or 1
        lines.append(f"  {name}  {dtype} {list(tensor.shape)}" + (f"  in {parts} parts" if parts > 1 else ""))
        kind = name.split(".")[0] if name.startswith("optim.") else "weights"
        kinds[kind] += math.prod(tensor.shape)
    lines += [f"{kind}: {count:,} values" for kind, count in kinds.items()]
    lines += [f"NOT FINITE: {count:,} values of {name}" for name, count in sorted(wrong.items())]
    lines += ["all values are finite"] if values and not wrong else []
    size = sum(path.stat().st_size for path in pretrained.folder.iterdir() if path.is_file())
    return "\n".join([*lines, f"files: {size:,} bytes"])


def _not_finite(tensor: LazyTensor) -> int:
    """Return how many values of a tensor are NaN or infinite."""
    if not tensor.dtype.is_floating_point:
        return 0
    return sum(int((~part.isfinite()).sum()) for _, part in tensor.parts())


def _indented(text: str) -> list[str]:
    return ["  " + line for line in text.splitlines()]
