"""The samples that a run never reads again, beside its checkpoints: `skipped_samples.json`.

A run that goes back to a checkpoint because of the samples behind it has to know them, also if it is killed before it
has saved another checkpoint. So they are written to this file, and synced, before anything else happens. Each later
checkpoint names them too (`CheckpointInfo.data.skipped`), which tells it from those of the branch that was left. For
example, after a run has gone back from step 70 to the checkpoint of step 40:

    step_00000040     not later than 40: it stays
    step_00000060     does not name the samples: it is of the branch that was left, and is passed over
    step_00000060     names them: the run has come to step 60 again

The file is sealed as `checkpoint.json` is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from data_pipeline.disk import move, sync_path, write_file_atomically
from data_pipeline.foreign import convert, read_json
from data_pipeline.printable import printable
from gptoss_dist.checkpoint.info import SkippedSamples, check_skipped, is_sealed, read_info, sealed

FILE = "skipped_samples.json"
_FORMAT = 1
_REMEDY = "restore it from a good copy, or delete it to read those samples again"


class _Stored(msgspec.Struct):
    format: int
    skipped: list[SkippedSamples]


def read_skipped(folder: str | Path) -> list[SkippedSamples]:
    """Return the samples that are recorded in a folder of checkpoints, in the order in which they were skipped.

    Raises:
        ValueError: The file is not what was written.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return []
    values = read_json(path, dict[str, Any], remedy=_REMEDY)
    if not is_sealed(values):
        raise ValueError(f"{printable(path)} is not what was written (SHA-256); {_REMEDY}")
    stored = convert(values, _Stored, path, remedy=_REMEDY)
    if stored.format != _FORMAT:
        raise ValueError(f"{printable(path)} has format {stored.format}, this version reads {_FORMAT}; {_REMEDY}")
    check_skipped(stored.skipped, path, remedy=_REMEDY)
    return stored.skipped


def write_skipped(folder: str | Path, skipped: Sequence[SkippedSamples]) -> None:
    """Record in a folder of checkpoints what its run skips; on return the disk has it. Only one rank may call it.

    A file that says otherwise is kept as `skipped_samples.json.superseded` if the run skips nothing.

    Raises:
        OSError: It cannot be written; what was there before is untouched.
    """
    path = Path(folder) / FILE
    with suppress(ValueError):  # a damaged one is replaced
        if read_skipped(folder) == list(skipped):
            return
    if skipped:
        write_file_atomically(path, sealed({"format": _FORMAT, "skipped": list(skipped)}).encode())
    else:
        move(path, path.with_name(f"{FILE}.superseded"))
    sync_path(path.parent)


def merge_skipped(*parts: Iterable[SkippedSamples]) -> list[SkippedSamples]:
    """Return the entries of all parts in their order, each once."""
    found: list[SkippedSamples] = []
    for entry in (entry for part in parts for entry in part):
        if entry not in found:
            found.append(entry)
    return found


def was_left(checkpoint: Path, skipped: Sequence[SkippedSamples]) -> bool:
    """Return whether a checkpoint belongs to a branch that its run left when it went back.

    Args:
        checkpoint: A checkpoint, which may be damaged: then it is not said to.
        skipped: What `read_skipped` returned for its folder.
    """
    if not skipped:
        return False
    try:
        info = read_info(checkpoint)
    except ValueError:
        return False
    data = info.get("data")
    known = data.get("skipped", []) if isinstance(data, dict) else []
    return any(info["step"] > entry["rewound_to"] and entry not in known for entry in skipped)
