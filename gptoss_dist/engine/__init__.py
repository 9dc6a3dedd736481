"""Who owns sharded parameters, backward and the optimizer step."""

from gptoss_dist.engine.fsdp import FsdpEngine

__all__ = ["FsdpEngine"]
