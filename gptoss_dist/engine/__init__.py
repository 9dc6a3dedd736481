"""Who owns sharded parameters, backward and the optimizer step."""

from gptoss_dist.engine.base import Engine, EngineSettings, Objective, StepResult, StepSums
from gptoss_dist.engine.build import build_engine, engine_kind, lay_out_engine

__all__ = [
    "Engine",
    "EngineSettings",
    "Objective",
    "StepResult",
    "StepSums",
    "build_engine",
    "engine_kind",
    "lay_out_engine",
]
