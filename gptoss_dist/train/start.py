"""Where a run starts: the checkpoint to resume from, and the run's folder."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import torch

from gptoss_dist import checkpoint
from gptoss_dist.config import Config
from gptoss_dist.distributed.collectives import broadcast_object
from gptoss_dist.model.config import SHAPING, ModelConfig

log = logging.getLogger(__name__)


def check_folder(config: Config) -> None:
    """Refuse to mix two runs in one folder. For rank 0."""
    if config.resume is None and checkpoint.checkpoints(config.checkpoint_folder):
        raise ValueError(
            f"checkpoint.dir={config.checkpoint_folder} holds checkpoints already; continue with --resume auto, or "
            "choose another --run.name"
        )


def open_folder(config: Config) -> None:
    """Create the run's folder and start log.txt. For rank 0."""
    folder, checkpoints = config.folder, config.checkpoint_folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.mkdir(parents=True, exist_ok=True)
        config.save(folder / "config.yaml")
        handler = logging.FileHandler(folder / "log.txt")
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be written ({error.strerror}); choose another --run.dir") from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("gptoss_dist")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    if shutil.disk_usage(folder).free < 2**30:
        log.warning("less than 1 GiB is free for %s", folder)


def check_resumable(config: Config, path: Path, info: dict) -> None:
    """Same parameters; and `samples_consumed` means the same samples only in data that are cut and shuffled alike."""
    before = info["config"]
    try:
        old_model = ModelConfig.from_dict(before["model"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}; resume it with the version of gptoss_dist that wrote it") from None
    for key in SHAPING:
        if (old := getattr(old_model, key)) != (new := getattr(config.model, key)):
            raise ValueError(f"{path} was trained with model.{key}={old}, now it is {new}; undo the change")
    for key, old, new in (
        ("data.seq_len", before["data"]["seq_len"], config.data.seq_len),
        ("data.packing", before["data"].get("packing", "contiguous"), config.data.packing),
        ("run.seed", before["run"]["seed"], config.run.seed),
    ):
        if old != new:
            raise ValueError(
                f"{path} was trained with {key} {old}, now it is {new}: its place in the data is lost; give it as "
                f"before, --{key} {old}"
            )
    if before["optim"]["freeze"] != config.optim.freeze:
        raise ValueError(
            f"{path} was trained with optim.freeze={before['optim']['freeze']}, now it is {config.optim.freeze}: the "
            f"optimizer's state does not fit; undo the change, or start a new run with --init.from {path}"
        )


def checkpoint_to_resume(config: Config) -> Path | None:
    if config.resume is None:
        return None
    folder = config.checkpoint_folder if config.resume == "auto" else Path(config.resume)
    if config.resume == "auto" and broadcast_object(lambda: not list(folder.glob("step_*[0-9]"))):
        return None
    return checkpoint.resolve(folder, print_message)


def print_message(unusual: str) -> None:
    """To the user, before there is a log."""
    if torch.distributed.get_rank() == 0:
        print(f"train.py: {unusual}", file=sys.stderr)
