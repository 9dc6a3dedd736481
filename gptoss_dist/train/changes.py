"""What differs: a resumed run from the run that wrote its checkpoint, and a rank from the other ranks.

Of a resumed run, each setting is listed, and what follows from it.

A checkpoint of step 20 of a run of 20 steps, resumed with `--train.steps 40`, gives two lines:

    changed: train.steps 20 -> 40
    the learning rate of step 21 is 5.7e-04, where step 20 had 1.0e-04
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch

from data_pipeline import Manifest
from data_pipeline.command_line import check_ranges
from data_pipeline.command_line.mistakes import naming
from data_pipeline.foreign import convert
from data_pipeline.printable import shortened, shown
from gptoss_dist.checkpoint.info import INFO
from gptoss_dist.config import Config, OptimConfig, ParallelConfig, TrainConfig
from gptoss_dist.distributed.agreement import Fact, source_digest
from gptoss_dist.engine.schedule import learning_rate
from gptoss_dist.tracking.about.revision import git_revision
from gptoss_dist.tracking.recorded.run import flat
from gptoss_dist.train.data import sources
from gptoss_dist.train.start import Start

T = TypeVar("T")

_PLACES = ("run.name", "run.dir", "checkpoint.dir", "resume", "engine.kind")
"""Settings that say where and how a run is kept, not what it computes: they are not listed."""
_WITHOUT_VALUES = ("tracking.uri",)
"""Settings that may hold a secret."""
_CONSEQUENCES = {
    "model.": "the model computes another function of its weights",
    "loss.": "the auxiliary losses and the gradients differ",
    "train.precision": "losses differ by rounding",
    "train.routing": "the experts get other tokens",
    "optim.weight_decay": "the weights decay at another rate",
    "optim.betas": "the optimizer's averages go on at other rates",
    "optim.clip_norm": "gradients are clipped at another norm",
    "validation.samples": "validation losses before and after are of other samples",
    "sampling.prompts": "samples before and after continue other texts",
}
_MOST_CHARACTERS = 80


def facts_of_start(config: Config) -> list[Fact]:
    """Return what must be the same on all ranks of a run, without secrets."""
    settings = {key: shown(str(value)) for key, value in _flat(config.to_dict()).items()}
    return [
        Fact(
            "code",
            {"the digest of the sources": source_digest("gptoss_dist", "data_pipeline")},
            "install the same version on all machines, or start it from one shared folder",
            notes={"the revision": git_revision()},
        ),
        Fact(
            "libraries",
            {"torch": torch.__version__, "Python": platform.python_version()},
            "start the run in the same environment on all machines",
        ),
        Fact("settings", settings, "give the same --config files and options on all machines"),
        Fact(
            "data",
            {shown(source.path): _content(source.path) for source in sources(config.data)},
            "copy the prepared data to all machines again, or use one shared folder",
        ),
    ]


def _content(folder: str) -> str:
    """Return a hash of the data in a folder, or a text if there are none, which `open_data` explains."""
    try:
        return Manifest.read(folder).content_sha256[:12]
    except ValueError:
        return "not readable as data"


def changes_of(start: Start, config: Config, processes: int) -> list[str]:
    """Return the lines of `describe_changes` for the checkpoint that a run starts from, if it does."""
    if start.info is None:
        return []
    return describe_changes(start.info.config, config, start.step, (start.info.world_size, processes))


def describe_changes(
    before: Mapping[str, Any], config: Config, step: int, processes: tuple[int | None, int]
) -> list[str]:
    """Return a line for each setting that differs from those of a checkpoint, and for each thing that follows.

    Args:
        before: The configuration of the run that wrote the checkpoint, as nested plain values. Settings that it lacks
            are newer than that run; they are not listed.
        config: That of the resumed run.
        step: Optimizer steps done.
        processes: How many processes wrote it, if that is known, and how many there are now.
    """
    old, new = _flat(before), _flat(config.to_dict())
    changed = [key for key in new if key in old and old[key] != new[key] and key not in _PLACES]
    lines = [_change(key, old[key], new[key]) for key in changed]
    if processes[0] is not None and processes[0] != processes[1]:
        lines.append(f"changed: processes {processes[0]} -> {processes[1]}")
    followed = {text: None for key in changed for start, text in _CONSEQUENCES.items() if key.startswith(start)}
    return [*lines, *_learning_rate(before, config, step), *_batch(before, config, processes), *followed]


def _change(key: str, old: object, new: object) -> str:
    return f"changed: {key}" if key in _WITHOUT_VALUES else f"changed: {key} {_shown(old)} -> {_shown(new)}"


def _learning_rate(before: Mapping[str, Any], config: Config, step: int) -> Iterator[str]:
    """Yield a line if the next step has another learning rate than it would have had."""
    optim, train = _section(before, "optim", OptimConfig), _section(before, "train", TrainConfig)
    steps, last = train.steps, config.train.steps
    if step >= last:
        return
    now = learning_rate(step, last, config.optim)
    if step >= steps:  # the earlier run ended here
        then, whose = learning_rate(step - 1, steps, optim), f"step {step} had"
    else:
        then, whose = learning_rate(step, steps, optim), "it would have had"
    if abs(now - then) > 0.01 * max(now, then) and (steps != last or optim != config.optim):
        yield f"the learning rate of step {step + 1} is {now:.1e}, where {whose} {then:.1e}"


def _batch(before: Mapping[str, Any], config: Config, processes: tuple[int | None, int]) -> Iterator[str]:
    """Yield a line if a step has another number of samples."""
    if processes[0] is None:
        return
    train = _section(before, "train", TrainConfig)
    split = _section(before, "parallel", ParallelConfig).context_parallel, config.parallel.context_parallel
    old = train.micro_batch_size * train.gradient_accumulation * processes[0] // split[0]
    new = config.train.micro_batch_size * config.train.gradient_accumulation * processes[1] // split[1]
    if old and old != new:
        yield (
            f"a step has {new} samples instead of {old}: the learning rate may need to change with it, and the rest of "
            f"the run reads {new / old:.3g} times as much data"
        )


def _section(before: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """Return a section of the configuration that a checkpoint records.

    Raises:
        ValueError: A value in it is none that the section can have.
    """
    remedy = "resume it with the version of gptoss_dist that wrote it"
    section = convert(before.get(name), kind, f"{INFO}: config.{name}", finite=True, remedy=remedy)
    with naming(INFO):
        check_ranges(section, f"config.{name}.")
    return section


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of sections by key, such as `train.steps`; tuples as the lists that JSON makes of them."""
    settings = flat(values, is_section=lambda key: "." not in key or key == "model.rope_scaling")
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def _shown(value: object) -> str:
    return shortened(repr(value) if isinstance(value, str) else value, _MOST_CHARACTERS)
