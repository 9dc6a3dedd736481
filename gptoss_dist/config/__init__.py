"""The one tree of settings that YAML files and the command line fill."""

from gptoss_dist.config.data import DataConfig, SourceConfig, StageConfig
from gptoss_dist.config.distributed import DistributedConfig
from gptoss_dist.config.parallel import EngineConfig, ParallelConfig
from gptoss_dist.config.parse import build_parser, check_named, load_config, parse_arguments
from gptoss_dist.config.sections import (
    CheckpointConfig,
    EvaluationConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    SamplingConfig,
    SpikesConfig,
    TrackingConfig,
    TrainConfig,
    ValidationConfig,
)
from gptoss_dist.config.tree import Config
from gptoss_dist.model.config import ModelConfig, RopeScaling

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistributedConfig",
    "EngineConfig",
    "EvaluationConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RopeScaling",
    "RunConfig",
    "SamplingConfig",
    "SourceConfig",
    "SpikesConfig",
    "StageConfig",
    "TrackingConfig",
    "TrainConfig",
    "ValidationConfig",
    "build_parser",
    "check_named",
    "load_config",
    "parse_arguments",
]
