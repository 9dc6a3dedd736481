"""Checkpoints: a directory that either is complete or does not exist.

    step_00000100/
      shard-*.safetensors   tensors of each rank, with their place in the whole tensor (torch DCP plans and reshards)
      rng_00000.json        random generators of each rank
      checkpoint.json       step, samples consumed, settings, versions, MLflow run id: written last
      tokenizer files

Nothing is pickled. Everything is written to `step_N.tmp` and renamed when all ranks are done and the disk has it.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

from gptoss_dist.parallel.context import on_rank_zero

INFO = "checkpoint.json"
FORMAT = 1


def save(
    folder: str | Path,
    step: int,
    state: dict[str, Tensor],
    info: dict,
    *,
    keep: int = 0,
    extra_files: Callable[[Path], None] | None = None,
) -> Path:
    """Write `folder/step_N` from all ranks; collective.

    Args:
        folder: the run's checkpoint folder; created if missing.
        step: optimizer steps done.
        state: tensors by name; DTensors are written as the shards they are.
        info: JSON values stored with them.
        keep: afterwards delete all but this many newest checkpoints; 0 keeps all.
        extra_files: called on rank 0 with the unfinished directory, to add files to it.

    Returns:
        The finished directory.

    Raises:
        OSError: the folder cannot be written; what was there before is untouched.
    """
    folder = Path(folder)
    final = folder / f"step_{step:08d}"
    partial = final.with_name(final.name + ".tmp")

    def begin() -> None:
        for stale in folder.glob("step_*.tmp"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)

    def commit() -> None:
        if extra_files is not None:
            extra_files(partial)
        for path in partial.iterdir():
            _sync(path)
        values = {
            "format": FORMAT,
            "step": step,
            "world_size": dist.get_world_size(),
            "torch": torch.__version__,
            **info,
        }
        _write(partial / INFO, json.dumps(values, indent=1))
        _sync(partial)
        _remove(final)
        partial.rename(final)
        _sync(folder)
        for old in checkpoints(folder)[:-keep] if keep else []:
            _remove(old)

    on_rank_zero(begin)
    try:
        dcp.save(state, storage_writer=_Writer(str(partial), save_distributed=True))
    except CheckpointException as error:
        reasons = sorted({str(reason) for reason, _ in error.failures.values()})
        raise OSError(f"checkpoint {final} not written: {'; '.join(reasons)}") from error
    _write(partial / f"rng_{dist.get_rank():05d}.json", json.dumps(rng_state()))
    dist.barrier()
    on_rank_zero(commit)
    return final


class _Writer(HuggingFaceStorageWriter):
    """One safetensors file per rank; more where a rank has several parts of a tensor, since a file holds one value per
    name: the n-th parts of all tensors go to the n-th file."""

    def _split_by_storage_plan(self, storage_plan, items):
        files, seen = {}, Counter()
        for item in items:
            seen[item.index.fqn] += 1
            files.setdefault(seen[item.index.fqn], []).append(item)
        return files


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint so that it never looks complete on the way."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(checkpoint.name + ".tmp.old")
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def set_aside(folder: str | Path, after: int) -> list[Path]:
    """Rename the checkpoints later than step `after` to `step_N.superseded`: a run that goes on from an earlier one
    must not take them for its own. Call it on one rank; returns the new names."""
    moved = []
    for path in checkpoints(folder):
        if int(path.name.removeprefix("step_")) > after:
            target = path.with_name(path.name + ".superseded")
            shutil.rmtree(target, ignore_errors=True)
            moved.append(path.rename(target))
    return moved


def checkpoints(folder: str | Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    folder = Path(folder)
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in found if re.fullmatch(r"step_\d{8,}", p.name) and (p / INFO).is_file())


def resolve(path: str | Path) -> Path:
    """The checkpoint meant by a checkpoint directory, a folder of checkpoints or a run's folder.

    Raises:
        ValueError: there is no complete checkpoint.
    """
    path = Path(path)
    if (path / INFO).is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if found := checkpoints(folder):
            return found[-1]
    raise ValueError(f"no complete checkpoint in {path}; expected step_*/{INFO} there or in its checkpoints/ folder")


def read_info(checkpoint: str | Path) -> dict:
    """The JSON values stored with a checkpoint.

    Raises:
        ValueError: it is not a checkpoint, or of a newer format.
    """
    path = Path(checkpoint) / INFO
    try:
        info = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from None
    if info.get("format") != FORMAT:
        raise ValueError(f"{path} has format {info.get('format')}, this version reads {FORMAT}")
    return info


def load_state(checkpoint: str | Path, state: dict[str, Tensor]) -> None:
    """Fill the tensors of `state` in place, from any number of ranks that wrote it; collective.

    Raises:
        ValueError: names or shapes differ, or a file is damaged.
    """
    _load(checkpoint, state)


def load_weights(checkpoint: str | Path, weights: dict[str, Tensor]) -> None:
    """Fill a plain model state dict from a training checkpoint, in one process without a process group.

    Raises:
        ValueError: as `load_state`; optimizer state in the checkpoint is ignored.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is meant
        _load(checkpoint, {f"model.{name}": tensor for name, tensor in weights.items()}, "model.", no_dist=True)


def _load(checkpoint: str | Path, state: dict[str, Tensor], prefix: str = "", **options) -> None:
    """Fill `state` from the checkpoint's tensors whose names begin with `prefix`."""
    try:
        reader = HuggingFaceStorageReader(str(checkpoint))
        found = reader.read_metadata().state_dict_metadata
        stored = {name: entry for name, entry in found.items() if name.startswith(prefix)}
        if problems := misfits(state, {name: entry.size for name, entry in stored.items()}):
            raise ValueError(f"checkpoint {checkpoint} does not fit the model: " + "; ".join(problems))
        dcp.load(state, storage_reader=reader, **options)
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


def rng_state() -> dict:
    """States of python's, numpy's and torch's generators as JSON values."""
    version, keys, gauss = random.getstate()
    name, array, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(keys), gauss],
        "numpy": [name, array.tolist(), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def restore_rng(checkpoint: str | Path, rank: int) -> bool:
    """Restore this rank's generators; False if the checkpoint has none for it (another number of ranks wrote it)."""
    path = Path(checkpoint) / f"rng_{rank:05d}.json"
    if not path.is_file():
        return False
    state = json.loads(path.read_text())
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_decode(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))
    return True


def _encode(tensor: Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


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
