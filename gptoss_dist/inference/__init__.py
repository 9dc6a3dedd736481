"""Sessions with a trained model, for people and for evaluation."""

from gptoss_dist.inference.generation import Completion, complete
from gptoss_dist.model.generate import generate
from gptoss_dist.model.kv_cache import KVCache
from gptoss_dist.model.sampling import GREEDY, Sampling
from gptoss_dist.ops.sampling import sample

__all__ = ["GREEDY", "Completion", "KVCache", "Sampling", "complete", "generate", "sample"]
