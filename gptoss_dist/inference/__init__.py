"""Sessions with a trained model, for people and for evaluation."""

from gptoss_dist.model.generate import generate, sample
from gptoss_dist.model.kv_cache import KVCache

__all__ = ["KVCache", "generate", "sample"]
