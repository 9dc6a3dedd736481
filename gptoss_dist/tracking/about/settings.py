"""Which settings of a run make it what it is: those that are not the defaults, and the command that trains by them."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoss_dist.config import Config, ModelConfig
from gptoss_dist.tracking.recorded.run import flat

UNKNOWN = object()
"""The default of a setting that this version does not have."""
_PLACES = ("run.name", "run.dir", "checkpoint.dir", "resume")
"""Settings that name a run and do not change what it computes."""


def changed_settings(settings: Mapping[str, Any], *, with_model: bool) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ from the defaults, without those that name the run.

    Args:
        settings: Of a run, flat: `optim.lr` and its value.
        with_model: Include those of the model, which are all of a model that is not the smallest.

    Returns:
        Value and default by key. The default of a section is a dictionary; it is `UNKNOWN` if there is none.
    """
    changed = {}
    for key, value in settings.items():
        if key in _PLACES or (key.startswith("model.") and not with_model):
            continue
        default = _default(key)
        is_unset = default is UNKNOWN and value is None
        if not is_unset and default != _as_list(value):
            changed[key] = value, default
    return changed


def launch_command(config: Path, processes: int, machines: int | None) -> str:
    """Return the line of a shell that trains by a file of settings.

    Args:
        config: The file.
        processes: Of all machines.
        machines: None if that was not recorded; one is assumed.
    """
    file = shlex.quote(str(config))
    if processes <= 1:
        return f"python launch/train.py --config {file}"
    machines = max(machines or 1, 1)
    where = "--standalone" if machines == 1 else f"--nnodes {machines} ..."
    return f"torchrun {where} --nproc_per_node {processes // machines} launch/train.py --config {file}"


def repeated(launch: str, name: str) -> str:
    """Return the line of a shell that trains a run again, under another name and in folders of its own.

    Args:
        launch: The line that trains by its settings.
        name: Its name.
    """
    again = shlex.quote(f"--run.name={name}-again")
    return f"{launch} {again} --run.dir null --checkpoint.dir null"


def _default(key: str) -> Any:
    defaults = _defaults()
    if key in defaults:
        return defaults[key]
    section = f"{key}."
    parts = {name.removeprefix(section): value for name, value in defaults.items() if name.startswith(section)}
    return parts or UNKNOWN


@functools.cache
def _defaults() -> dict[str, Any]:
    return {key: _as_list(value) for key, value in flat(Config(model=ModelConfig()).to_dict()).items()}


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
