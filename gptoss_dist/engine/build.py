"""The choice of the engine."""

from __future__ import annotations

from typing import Literal

from gptoss_dist.config import EngineConfig
from gptoss_dist.distributed.launchers import is_deepspeed
from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.engine.base import Engine, EngineSettings, Objective


def engine_kind(engine: EngineConfig) -> Literal["fsdp", "deepspeed"]:
    """Return the kind of a run's engine.

    With `engine.kind=auto` it is the one that the settings speak of, else the one that the launcher is made for.
    """
    if engine.kind == "auto":
        meant = engine.zero_stage is not None or engine.deepspeed is not None
        return "deepspeed" if meant or is_deepspeed() else "fsdp"
    return engine.kind


def build_engine(settings: EngineSettings, ranks: Ranks, objective: Objective) -> Engine:
    """Build the engine that the settings name, with the initial weights of their seed; collective.

    Args:
        settings: What the engine reads of the configuration.
        ranks: The processes of the run.
        objective: What the model is trained and evaluated for.

    Raises:
        ValueError: Settings do not fit each other or the number of processes.
    """
    engine = lay_out_engine(settings, ranks, objective)
    engine.materialize()
    return engine


def lay_out_engine(settings: EngineSettings, ranks: Ranks, objective: Objective) -> Engine:
    """Do as `build_engine`, but leave the model on the meta device: `materialize` gives it memory; collective."""
    if engine_kind(settings.engine) == "deepspeed":
        from gptoss_dist.engine.deepspeed import DeepSpeedEngine  # imports DeepSpeed, which takes seconds

        return DeepSpeedEngine(settings, ranks, objective)
    from gptoss_dist.engine.fsdp import FsdpEngine

    return FsdpEngine(settings, ranks, objective)
