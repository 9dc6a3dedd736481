"""Sharded, resumable checkpoints."""

from gptoss_dist.checkpoint.store import (
    checkpoints,
    load_state,
    load_weights,
    read_info,
    resolve,
    restore_rng,
    save,
    set_aside,
)

__all__ = ["checkpoints", "load_state", "load_weights", "read_info", "resolve", "restore_rng", "save", "set_aside"]
