"""Whether a container sees the folders that a run reads and writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.shards.manifest import Manifest
from gptoss_dist.cluster.job import Job
from gptoss_dist.config import Config


def check_mounts(job: Job, config: Config) -> None:
    """Refuse a run with a folder that its container would not see, or would see under another name.

    The job's script looks for checkpoints outside of the container, so the run's folder and that of its checkpoints
    have the same name on both sides. A link inside of a mounted folder must lead to a mounted one.

    Raises:
        ValueError: There is such a folder; the message says what to mount.
    """
    if job.site.container_runtime == "none":
        return
    here = job.working_directory
    mounts = [(job.root, job.root), (here, here), *map(_sides, job.site.container_mounts)]
    same = [inner for outer, inner in mounts if outer == inner]
    for key, folder in (("run.dir", config.folder), ("checkpoint.dir", config.checkpoint_folder)):
        _check(key, here / folder, same, " under its own name")
    for key, name in _read(config):
        path = Path(os.path.normpath(here / name))
        if any(outer != inner and path.is_relative_to(inner) for outer, inner in mounts):
            continue  # where links inside of it lead is known to the container alone
        _check(key, path, same)


def missing_data(config: Config) -> str | None:
    """Return why the data of a run cannot be read here; None if they can."""
    for key, name in _read(config):
        if key.startswith("data."):
            try:
                Manifest.read(name)
            except ValueError as error:
                return str(error)
    return None


def _sides(mount: str) -> tuple[Path, Path]:
    """Split OUTSIDE[:INSIDE[:OPTIONS]]."""
    outer, inner = [*mount.split(":"), "", ""][:2]
    return Path(outer), Path(inner or outer)


def _read(config: Config) -> Iterator[tuple[str, str]]:
    if config.data.path is not None:
        yield "data.path", config.data.path
    for source in config.data.sources:
        yield "data.sources", source.path
    if config.init["from"] is not None:
        yield "init.from", config.init["from"].removeprefix("hf:").removeprefix("openai:")


def _check(key: str, path: Path, mounts: list[Path], how: str = "") -> None:
    path = Path(os.path.normpath(path))
    for place in (path, Path(os.path.realpath(path))):
        if not any(place.is_relative_to(mount) for mount in mounts):
            there = next((folder for folder in (place, *place.parents[:-1]) if folder.is_dir()), place)
            link = f", which is {place}," if place != path else ""
            raise ValueError(
                f"{key}={path}{link} is in no folder that the container sees{how}; add {there}:{there} to "
                "container_mounts in the file of --site"
            )
