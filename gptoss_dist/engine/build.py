"""The choice of the engine."""

from __future__ import annotations

from gptoss_dist.config import Config
from gptoss_dist.distributed.launchers import is_deepspeed
from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.engine.base import Engine


def engine_kind(config: Config) -> str:
    """`fsdp` or `deepspeed`: with `engine.kind=auto` what the settings speak of, else what the launcher is made for."""
    engine = config.engine
    if engine.kind == "auto":
        meant = engine.zero_stage is not None or engine.deepspeed is not None
        return "deepspeed" if meant or is_deepspeed() else "fsdp"
    return engine.kind


def build_engine(config: Config, ranks: Ranks) -> Engine:
    """The engine that `config` names, with the initial weights of `run.seed`; collective.

    Raises:
        ValueError: settings do not fit each other or the number of processes.
    """
    if engine_kind(config) == "deepspeed":
        from gptoss_dist.engine.deepspeed import DeepSpeedEngine  # imports DeepSpeed, which takes seconds

        return DeepSpeedEngine(config, ranks)
    from gptoss_dist.engine.fsdp import FsdpEngine

    return FsdpEngine(config, ranks)
