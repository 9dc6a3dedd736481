"""The model: pure math on one device."""

from gptoss_dist.model.config import ModelConfig, RopeScaling
from gptoss_dist.model.transformer import GptOss

__all__ = ["GptOss", "ModelConfig", "RopeScaling"]
