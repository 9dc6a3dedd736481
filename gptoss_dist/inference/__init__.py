"""Text generation with a key/value cache."""

from gptoss_dist.inference.generate import generate, sample
from gptoss_dist.inference.kv_cache import KVCache

__all__ = ["KVCache", "generate", "sample"]
