"""Prefill a prompt in a process of its own, and print what it took: `python -m tests.support.prefill TOKENS`."""

import json
import resource
import sys
import time

import torch

from gptoss_dist import GptOss, ModelConfig
from gptoss_dist.model.generate import prefill
from gptoss_dist.model.init import initialize
from gptoss_dist.model.kv_cache import KVCache

CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=4,
    num_experts_per_tok=2,
)


@torch.no_grad()
def measure(tokens: int) -> dict:
    """Return seconds, of this process too, its peak in bytes, the peak before, and the bytes of the cache."""
    model = GptOss(CONFIG)
    initialize(model, seed=0)
    model.eval()
    ids = torch.randint(0, CONFIG.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    prefill(model, ids[:, :512], KVCache(CONFIG), chunk=256)  # what is loaded and built at first use
    cache = KVCache(CONFIG, capacity=tokens)
    before = peak()
    wall, cpu = time.perf_counter(), time.process_time()
    logits = prefill(model, ids, cache)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert torch.isfinite(logits).all() and cache.length == tokens
    bytes_ = {"before": before, "peak": peak(), "cache": cache.nbytes()}
    return {"tokens": tokens, "seconds": round(wall, 2), "cpu_seconds": round(cpu, 2), **bytes_}


def peak() -> int:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
