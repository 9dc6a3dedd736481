"""Distributed training of GPT-OSS style mixture-of-experts language models."""

from importlib import import_module

__all__ = ["GptOss", "ModelConfig", "load_pretrained", "save_pretrained"]
__version__ = "0.1.0"

_HOME = {
    "GptOss": "gptoss_dist.model.transformer",
    "ModelConfig": "gptoss_dist.model.config",
    "load_pretrained": "gptoss_dist.checkpoint.formats.pretrained",
    "save_pretrained": "gptoss_dist.checkpoint.formats.export",
}


def __getattr__(name: str):
    # On first use: reading a config must not wait for torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
