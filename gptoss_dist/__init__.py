"""Distributed training of GPT-OSS style mixture-of-experts language models."""

from gptoss_dist.model import GptOss, ModelConfig

__all__ = ["GptOss", "ModelConfig"]
__version__ = "0.1.0"
