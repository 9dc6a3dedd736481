"""Checkpoints: a directory that either is complete or does not exist.

    step_00000100/
      rank_00000.safetensors   what this rank writes of each tensor, with its place in the whole (torch DCP reshards)
      rng_00000.json           random generators of each rank
      checkpoint.json          step, samples consumed, settings, versions, size and SHA-256 of every file: written last
      tokenizer files

Nothing is pickled. Everything is written to `step_N.tmp` and renamed when all ranks are done and the disk has it.
"""

from __future__ import annotations

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

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from gptoss_dist.checkpoint.boxes import Box
from gptoss_dist.checkpoint.formats.tensor_files import write_boxes
from gptoss_dist.checkpoint.info import FORMAT, INFO, read_info, sealed
from gptoss_dist.distributed.collectives import all_gather_objects, broadcast_object, on_rank_zero

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is complete."""

    newest: int = 0
    """This many; 0 keeps all."""
    every: int = 0
    """And those whose step is a multiple of this; 0 names none."""
    best: bool = False
    """And the one with the lowest `validation_loss`."""


def write(
    folder: str | Path,
    step: int,
    parts: Mapping[str, tuple[Sequence[int], list[Box]]],
    info: dict,
    rng: dict,
    *,
    keep: Retention,
    extra_files: Callable[[Path], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write `folder/step_N` from all ranks; collective.

    Args:
        folder: the run's checkpoint folder; created if missing.
        step: optimizer steps done.
        parts: whole shape of each tensor and the boxes of it that this rank writes, on the CPU.
        info: JSON values stored with them.
        rng: this rank's `rng_state`.
        keep: afterwards the others are deleted.
        extra_files: called on rank 0 with the unfinished directory, to add files to it.
        group: of all ranks, for a thread beside the training.

    Returns:
        The finished directory.

    Raises:
        OSError: it cannot be written; what was there before is untouched. The same on all ranks.
    """
    folder, rank = Path(folder), dist.get_rank(group)
    final = folder / f"step_{step:08d}"
    partial = final.with_name(final.name + ".tmp")

    def begin() -> None:
        for stale in folder.glob("step_*.tmp*"):
            shutil.rmtree(stale, ignore_errors=True)  # what somebody still reads may stay
        partial.mkdir(parents=True)

    def write_share() -> dict[str, dict]:
        files = write_boxes(partial, f"rank_{rank:05d}", parts)
        path = partial / f"rng_{rank:05d}.json"
        _write(path, json.dumps(rng))
        return {path.name: _fingerprint(path) for path in [*files, path]}

    def commit() -> None:
        if extra_files is not None:
            before = set(partial.iterdir())
            extra_files(partial)
            for path in set(partial.iterdir()) - before:
                _sync(path)
                shares[0][path.name] = _fingerprint(path)
        values = {
            "format": FORMAT,
            "step": step,
            "world_size": dist.get_world_size(group),
            "torch": torch.__version__,
            **info,
            "files": {name: entry for share in shares for name, entry in sorted(share.items())},
        }
        _write(partial / INFO, sealed(values))
        _sync(partial)
        if final.exists():
            _set_aside(final)
        partial.rename(final)
        _sync(folder)

    try:
        on_rank_zero(begin, group)
        shares, written = zip(*_on_all_ranks(lambda: (write_share(), _counts(parts)), group))
        incomplete = [n for n, (shape, _) in parts.items() if sum(c[n] for c in written) != math.prod(shape)]
        assert not incomplete, f"the ranks together do not hold each element of {incomplete} once"
        on_rank_zero(commit, group)
    except OSError as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"checkpoint {final} not written: {error}") from error
    if rank == 0:
        try:
            prune(folder, keep)
        except OSError as error:  # the new one is complete all the same
            log.warning("old checkpoints in %s cannot be deleted: %s", folder, error)
    return final


def _counts(parts: Mapping[str, tuple[Sequence[int], list[Box]]]) -> dict[str, int]:
    return {name: sum(box.values.numel() for box in boxes) for name, (_, boxes) in parts.items()}


def _on_all_ranks(function: Callable, group: dist.ProcessGroup | None) -> list:
    """The results of all ranks, on all ranks; collective.

    Raises:
        OSError: it raised anything on any rank.
    """
    result, failure = None, None
    try:
        result = function()
    except Exception as error:  # nobody is left waiting for a rank that gave up
        failure = str(error) if isinstance(error, OSError) else repr(error)
    results = [None] * dist.get_world_size(group)
    dist.all_gather_object(results, (result, failure), group)
    if failures := sorted({failure for _, failure in results if failure}):
        raise OSError("; ".join(failures))
    return [result for result, _ in results]


def prune(folder: str | Path, keep: Retention) -> None:
    """Delete the checkpoints that `keep` does not name. For one rank.

    Raises:
        OSError: one cannot be deleted.
    """
    if keep.newest == 0:
        return
    found = checkpoints(folder)
    losses = {path: _validation_loss(path) for path in found} if keep.best else {}
    finite = [path for path, loss in losses.items() if loss is not None and math.isfinite(loss)]
    best = min(finite, key=losses.get, default=None)
    for path in found[: -keep.newest]:
        if path != best and not (keep.every and _step(path) % keep.every == 0):
            doomed = path.with_name(path.name + ".tmp.old")  # it never looks complete on the way
            path.rename(doomed)
            shutil.rmtree(doomed)


def _validation_loss(checkpoint: Path) -> float | None:
    try:
        return read_info(checkpoint).get("validation_loss")
    except ValueError:
        return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def set_aside(folder: str | Path, after: int) -> list[Path]:
    """Rename the checkpoints later than step `after` to `step_N.superseded`: a run that goes on from an earlier one
    must not take them for its own. Call it on one rank; returns the new names."""
    return [_set_aside(path) for path in _directories(folder) if _step(path) > after]


def _set_aside(path: Path) -> Path:
    target = path.with_name(path.name + ".superseded")
    shutil.rmtree(target, ignore_errors=True)
    return path.rename(target)


def _directories(folder: str | Path) -> list[Path]:
    """Those named like checkpoints, oldest first, complete or not."""
    folder = Path(folder)
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in found if re.fullmatch(r"step_\d{8,}", p.name) and p.is_dir())


def checkpoints(folder: str | Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first; their files are not looked at."""
    return [path for path in _directories(folder) if (path / INFO).is_file()]


def candidates(path: str | Path) -> list[Path]:
    """Directories named like checkpoints, oldest first: `path` itself, or those in it or in its checkpoints/.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    found = [path] if (path / INFO).is_file() else _directories(path) or _directories(path / "checkpoints")
    if not found:
        raise ValueError(f"no complete checkpoint in {path}; expected step_*/{INFO} in it or in its checkpoints/")
    return found


def resolve(path: str | Path, message: Callable[[str], None] = log.warning) -> Path:
    """The checkpoint meant by a checkpoint directory, or the newest intact one of a folder of checkpoints or of a
    run's folder. Collective where there are ranks: each hashes a share of the files.

    Args:
        message: gets a line about each newer one that is passed over.

    Raises:
        ValueError: there is none, or none is intact.
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
    """What is wrong with a checkpoint, a phrase for each file; collective where there are ranks.

    Every file's size and SHA-256 must be those that were written.
    """
    checkpoint, together = Path(checkpoint), dist.is_initialized() and dist.get_world_size() > 1
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    try:
        info = read_info(checkpoint)
    except ValueError as error:
        problems = [str(error)]
    else:
        named = re.fullmatch(r"step_(\d+)", checkpoint.name)
        problems = [f"{INFO} is of step {info['step']}"] if named and int(named[1]) != info["step"] else []
        strange = {path.name for path in checkpoint.glob("*.safetensors")} - info["files"].keys()
        problems += [f"{name} does not belong to it" for name in sorted(strange)]
        for name, expected in sorted(info["files"].items())[rank::ranks]:
            path = checkpoint / name
            try:
                if not path.is_file():
                    problems.append(f"{name} is missing")
                elif path.stat().st_size != expected["bytes"]:
                    problems.append(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
                elif _fingerprint(path) != expected:
                    problems.append(f"{name} is not what was written (SHA-256)")
            except OSError as error:
                problems.append(f"{name} cannot be read ({error})")
    if together:
        problems = sorted({problem for share in all_gather_objects(problems) for problem in share})
    return problems


def load_state(checkpoint: str | Path, state: dict[str, Tensor]) -> None:
    """Fill the tensors of `state` in place, from any number of ranks that wrote it; collective.

    Raises:
        ValueError: names or shapes differ, or a file is damaged.
    """
    try:
        reader = HuggingFaceStorageReader(str(checkpoint))
        stored = reader.read_metadata().state_dict_metadata
        if problems := misfits(state, {name: entry.size for name, entry in stored.items()}):
            raise ValueError(f"checkpoint {checkpoint} does not fit the model: " + "; ".join(problems))
        dcp.load(state, storage_reader=reader)
    except ValueError:
        raise
    except Exception as error:  # safetensors, DCP and the file system each have their own
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {' '.join(str(error).split())[:300]}") from error


def misfits(state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """What is missing, surplus or of another shape in a checkpoint with tensors of `shapes`, a phrase each."""
    problems = [f"{name} is missing" for name in state if name not in shapes]
    problems += [f"{name} is not expected" for name in shapes if name not in state]
    return problems + [
        f"{name} has shape {tuple(shapes[name])}, expected {tuple(tensor.shape)}"
        for name, tensor in state.items()
        if name in shapes and tuple(shapes[name]) != tuple(tensor.shape)
    ]


def _fingerprint(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
