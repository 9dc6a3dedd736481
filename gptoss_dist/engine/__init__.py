"""Who owns sharded parameters, backward and the optimizer step."""

from gptoss_dist.engine.base import Engine, StepResult
from gptoss_dist.engine.build import build_engine, engine_kind

__all__ = ["Engine", "StepResult", "build_engine", "engine_kind"]
