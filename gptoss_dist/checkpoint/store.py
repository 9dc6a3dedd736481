"""Checkpoints: a directory that either is complete or does not exist.

    step_00000100/
      rank_00000.safetensors   what this rank writes of each tensor, with its place in the whole (torch DCP reshards)
      rng_00000.json           the random generators of each rank
      checkpoint.json          the place of the run, and size and SHA-256 of every file (`info.py`): written last
      tokenizer files

Nothing is pickled. Everything is written to `step_N.tmp` and renamed when all ranks are done and the disk has it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from data_pipeline.command_line.mistakes import suggestion
from data_pipeline.disk import move, sync_path, write_synced
from data_pipeline.foreign import file_inside
from data_pipeline.printable import printable
from gptoss_dist.checkpoint.boxes import Box
from gptoss_dist.checkpoint.formats.headers import check_headers
from gptoss_dist.checkpoint.formats.tensor_files import write_boxes
from gptoss_dist.checkpoint.info import FORMAT, INFO, read_info, sealed
from gptoss_dist.checkpoint.skipped import read_skipped, was_left
from gptoss_dist.distributed.collectives import (
    all_gather_objects,
    broadcast_object,
    is_peer_loss,
    on_rank_zero,
    results_of_all_ranks,
)

log = logging.getLogger(__name__)

_READ_ON_RESUME = (
    "*.safetensors",
    "*.safetensors.index.json",
    "rng_*.json",
    "tokenizer.gptoss.json",
    "tokenizer.tiktoken",
    "generation_config.json",
    "chat_template.jinja",
)
"""What is read from the folder of a checkpoint, in a resume and by `open_pretrained`, whether or not it is listed."""


@dataclass(frozen=True)
class Retention:
    """The rule which checkpoints stay when a new one is complete. What any of its fields names, stays."""

    newest: int = 0
    """How many of the newest stay; 0 keeps all."""
    every: int = 0
    """Checkpoints whose step is a multiple of this stay; 0 names none."""
    best: bool = False
    """The checkpoint with the lowest `validation_loss` stays."""


Parts = Mapping[str, tuple[Sequence[int], list[Box]]]
"""The whole shape of each tensor by name, and the boxes of it that this rank holds."""


def write(
    folder: str | Path,
    step: int,
    parts: Parts,
    info: dict,
    rng: dict,
    *,
    keep: Retention,
    extra_files: Callable[[Path], None] | None = None,
    check: Callable[[], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write `folder/step_N` from all ranks; collective.

    Args:
        folder: The run's checkpoint folder. It is created if it is missing.
        step: Optimizer steps done.
        parts: The boxes that this rank writes, on the CPU.
        info: JSON values to store with the tensors; of a training run, `CheckpointInfo.to_json`.
        rng: This rank's `rng_state`.
        keep: The rule by which older checkpoints are deleted when this one is complete.
        extra_files: Called on rank 0 with the unfinished directory, to add files to it.
        check: Called on rank 0 before the first file, and before the directory gets its name; raises OSError if the
            folder is no longer this process's, which leaves in it whatever another has written.
        group: A group of all ranks, for a thread that writes beside the training.

    Returns:
        The finished directory.

    Raises:
        OSError: It cannot be written; what was there before is untouched. All ranks raise the same.
    """
    folder, rank = Path(folder), dist.get_rank(group)
    final = folder / f"step_{step:08d}"
    partial = final.with_name(final.name + ".tmp")
    try:
        on_rank_zero(lambda: _begin(folder, partial, check), group)
        shares, counts = zip(
            *results_of_all_ranks(lambda: (_write_share(partial, rank, parts, rng), _counts(parts)), group)
        )
        incomplete = [n for n, (shape, _) in parts.items() if sum(c[n] for c in counts) != math.prod(shape)]
        assert not incomplete, f"the ranks together do not hold each element of {incomplete} once"
        stored = {"format": FORMAT, "step": step, "world_size": dist.get_world_size(group), "torch": torch.__version__}
        on_rank_zero(lambda: _commit(partial, final, {**stored, **info}, shares, extra_files, check), group)
    except OSError as error:
        if rank == 0:
            with contextlib.suppress(OSError):
                _check(check)
                shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"checkpoint {final} not written: {error}") from error
    if rank == 0:
        tidy(folder, keep)
    return final


def _check(check: Callable[[], None] | None) -> None:
    if check is not None:
        check()


def _begin(folder: Path, partial: Path, check: Callable[[], None] | None) -> None:
    """Create the unfinished directory, and delete those that earlier saves left behind."""
    _check(check)
    _remove_unfinished(folder)
    partial.mkdir(parents=True)


def _write_share(partial: Path, rank: int, parts: Parts, rng: dict) -> dict[str, dict]:
    """Write this rank's boxes and random generators; return the fingerprints of the files by name."""
    files = write_boxes(partial, f"rank_{rank:05d}", parts)
    path = partial / f"rng_{rank:05d}.json"
    write_synced(path, json.dumps(rng))
    return {path.name: fingerprint(path) for path in [*files, path]}


def _commit(
    partial: Path,
    final: Path,
    values: dict,
    shares: Sequence[dict],
    extra_files: Callable[[Path], None] | None,
    check: Callable[[], None] | None,
) -> None:
    """Complete the unfinished directory and rename it to `final`.

    Args:
        values: What `checkpoint.json` holds besides the files.
        shares: The fingerprints, by name, of the files of each rank.
        extra_files: As for `write`.
        check: As for `write`.
    """
    shares = [*shares]
    if extra_files is not None:
        shares[0] = {**shares[0], **_write_extra_files(partial, extra_files)}
    files = {name: entry for share in shares for name, entry in sorted(share.items())}
    write_synced(partial / INFO, sealed({**values, "files": files}))
    sync_path(partial)
    _check(check)
    if final.exists():
        _set_aside(final)
    move(partial, final)
    sync_path(final.parent)


def _write_extra_files(partial: Path, extra_files: Callable[[Path], None]) -> dict[str, dict]:
    """Call `extra_files`; return the fingerprints of the files that it has added, by name."""
    before = set(partial.iterdir())
    extra_files(partial)
    added = set(partial.iterdir()) - before
    for path in added:
        sync_path(path)
    return {path.name: fingerprint(path) for path in added}


def _counts(parts: Parts) -> dict[str, int]:
    return {name: sum(box.values.numel() for box in boxes) for name, (_, boxes) in parts.items()}


def tidy(folder: str | Path, keep: Retention) -> None:
    """Delete the checkpoints that `keep` does not name, and what saves that were killed have left behind.

    What cannot be deleted is logged: the newest checkpoint is complete all the same. Only one rank may call it.
    """
    folder = Path(folder)
    try:
        _remove_unfinished(folder)
        _prune(folder, keep)
    except OSError as error:
        log.warning("old checkpoints in %s cannot be deleted: %s", folder, error)


def _remove_unfinished(folder: Path) -> None:
    for stale in folder.glob("step_*.tmp*"):
        if re.fullmatch(r"step_\d{8,}\.tmp(\.old)?", stale.name):
            shutil.rmtree(stale, ignore_errors=True)  # what somebody still reads may stay


def _prune(folder: Path, keep: Retention) -> None:
    if keep.newest == 0:
        return
    found = checkpoints(folder)
    losses = {path: _validation_loss(path) for path in found} if keep.best else {}
    finite = {path: loss for path, loss in losses.items() if loss is not None and math.isfinite(loss)}
    best = min(finite, key=finite.__getitem__, default=None)
    for path in found[: -keep.newest]:
        if path != best and not (keep.every and step_of(path) % keep.every == 0):
            doomed = path.with_name(path.name + ".tmp.old")  # it never looks complete on the way
            move(path, doomed)
            shutil.rmtree(doomed)


def _validation_loss(checkpoint: Path) -> float | None:
    try:
        return read_info(checkpoint).get("validation_loss")
    except ValueError:
        return None


def step_of(checkpoint: Path) -> int:
    """Return the step that the name of a checkpoint says."""
    return int(checkpoint.name.removeprefix("step_"))


def set_aside(folder: str | Path, after: int) -> list[Path]:
    """Rename the checkpoints later than step `after` to `step_N.superseded`.

    A run that goes on from an earlier checkpoint must not take them for its own. Only one rank may call it.

    Returns:
        The new paths.
    """
    return [_set_aside(path) for path in _directories(folder) if step_of(path) > after]


def _set_aside(path: Path) -> Path:
    target = path.with_name(path.name + ".superseded")
    shutil.rmtree(target, ignore_errors=True)
    move(path, target)
    return target


def _directories(folder: str | Path) -> list[Path]:
    """Return the directories that are named like checkpoints, oldest first, complete or not."""
    folder = Path(folder)
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in found if re.fullmatch(r"step_\d{8,}", p.name) and p.is_dir())


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first, without a look at their files."""
    return [path for path in _directories(folder) if (path / INFO).is_file()]


def candidates(path: str | Path) -> list[Path]:
    """Return the directories that may be meant by `path`, oldest first.

    If `path` is a checkpoint, it is the only one. Otherwise they are the directories named like checkpoints in it, or
    in its folder `checkpoints/`, without those of a branch that the run left when it went back to an earlier one.

    Raises:
        ValueError: There is none, or the record of what the run skips is damaged.
    """
    path = Path(path)
    if (path / INFO).is_file():
        return [path]
    if found := _directories(path) or _directories(path / "checkpoints"):
        skipped = read_skipped(found[0].parent)
        found = [checkpoint for checkpoint in found if not was_left(checkpoint, skipped)]
    if not found and not path.exists():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        close = suggestion(path.name, beside)
        raise ValueError(f"no complete checkpoint in {path}: there is no such folder{close}")
    if not found:
        raise ValueError(f"no complete checkpoint in {path}; expected step_*/{INFO} in it or in its checkpoints/")
    return found


def resolve(path: str | Path, message: Callable[[str], None] = log.warning) -> Path:
    """Return the newest intact checkpoint of those that `path` may mean.

    It is collective where there are ranks: each of them hashes a share of the files.

    Args:
        path: A checkpoint, a folder of checkpoints, or the folder of a run.
        message: Gets a line about each newer checkpoint that is passed over.

    Raises:
        ValueError: There is none, or none is intact.
    """
    chosen, reasons = broadcast_object(lambda: candidates(path)), []
    for candidate in reversed(chosen):
        problems = verify(candidate)
        if not problems:
            return candidate
        reasons.append(f"{candidate} is damaged: {'; '.join(problems[:3])}")
        if candidate != chosen[0]:
            message(f"{reasons[-1]}; the one before is taken")
    raise ValueError(f"no intact checkpoint in {path}: " + " | ".join(reasons))


def verify(checkpoint: str | Path) -> list[str]:
    """Return what is wrong with a checkpoint, a phrase for each file; collective where there are ranks.

    The size and SHA-256 of every file must be those that were written, and whatever a resume would read must be among
    these files.
    """
    checkpoint, together = Path(checkpoint), dist.is_initialized() and dist.get_world_size() > 1
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    try:
        info = read_info(checkpoint)
    except ValueError as error:
        problems = [str(error)]
    else:
        problems = _listing_problems(checkpoint, info)
        for name, expected in sorted(info["files"].items())[rank::ranks]:
            try:
                if not os.path.lexists(checkpoint / name):
                    problems.append(f"{name} is missing")
                    continue
                path = file_inside(checkpoint, name)
                if path.stat().st_size != expected["bytes"]:
                    problems.append(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
                elif fingerprint(path) != expected:
                    problems.append(f"{name} is not what was written (SHA-256)")
            except (OSError, ValueError) as error:
                problems.append(f"{name} cannot be read ({error})")
    if together:
        problems = sorted({problem for share in all_gather_objects(problems) for problem in share})
    return problems


def _listing_problems(checkpoint: Path, info: dict) -> list[str]:
    """Return what is wrong with the step of a checkpoint and the list of its files, without a look into them."""
    named, files = re.fullmatch(r"step_(\d+)", checkpoint.name), info["files"]
    problems = [f"{INFO} is of step {info['step']}"] if named and int(named[1]) != info["step"] else []
    found = {path.name for pattern in _READ_ON_RESUME for path in checkpoint.glob(pattern)}
    problems += [f"{printable(name)} does not belong to it" for name in sorted(found - files.keys())]
    generators = sum(re.fullmatch(r"rng_\d{5,}\.json", name) is not None for name in files)
    if isinstance(ranks := info.get("world_size"), int) and generators != ranks:
        problems.append(f"{INFO} lists {generators} files rng_*.json of {ranks} ranks")
    return problems


def load_state(checkpoint: str | Path, state: dict[str, Tensor]) -> None:
    """Fill the tensors of `state` in place, whatever number of ranks wrote the checkpoint; collective.

    Raises:
        ValueError: Names or shapes differ, or a file is damaged.
    """
    check_headers(Path(checkpoint), Path(checkpoint).glob("*.safetensors"))
    try:
        reader = HuggingFaceStorageReader(str(checkpoint))
        stored = reader.read_metadata().state_dict_metadata
        if problems := misfits(
            state, {name: cast(TensorStorageMetadata, entry).size for name, entry in stored.items()}
        ):
            raise ValueError(f"checkpoint {checkpoint} does not fit the model: " + "; ".join(problems))
        dcp.load(state, storage_reader=reader)
    except ValueError:
        raise
    except Exception as error:  # safetensors, DCP and the file system each have their own
        if is_peer_loss(error):
            raise
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {' '.join(str(error).split())[:300]}") from error


def misfits(state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return a phrase for each tensor that is missing, surplus or of another shape in a checkpoint of `shapes`.

    Where a layout is another one throughout, these are thousands: phrases that differ by their layer or expert alone
    are one, and of each kind there are at most eight.
    """
    problems = {
        "is missing": [name for name in state if name not in shapes],
        "is not expected": [name for name in shapes if name not in state],
    }
    for name, tensor in state.items():
        if name in shapes and tuple(shapes[name]) != tuple(tensor.shape):
            what = f"has shape {tuple(shapes[name])}, expected {tuple(tensor.shape)}"
            problems.setdefault(what, []).append(name)
    phrases = []
    for what, names in problems.items():
        alike: dict[str, list[str]] = {}
        for name in names:
            alike.setdefault(re.sub(r"\d+", "*", name), []).append(name)
        phrases += [
            f"{group[0]} {what}" if len(group) == 1 else f"{pattern} {what} ({len(group)} tensors)"
            for pattern, group in sorted(alike.items(), key=lambda item: -len(item[1]))[:8]
        ]
        if len(alike) > 8:
            phrases.append(f"so with {len(alike) - 8} more kinds of names: {what}")
    return phrases


def fingerprint(path: Path) -> dict:
    """Return the size of a file and the SHA-256 of its content."""
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
