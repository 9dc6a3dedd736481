"""Sharded, resumable checkpoints, and models of other tools."""

from gptoss_dist.checkpoint.export import export
from gptoss_dist.checkpoint.pretrained import check_architecture, load_into, load_pretrained, open_pretrained
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

__all__ = [
    "check_architecture",
    "checkpoints",
    "export",
    "load_into",
    "load_pretrained",
    "load_state",
    "load_weights",
    "open_pretrained",
    "read_info",
    "resolve",
    "restore_rng",
    "save",
    "set_aside",
]
