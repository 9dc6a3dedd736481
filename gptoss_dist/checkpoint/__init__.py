"""Sharded, resumable checkpoints, and models of other tools."""

from gptoss_dist.checkpoint.boxes import not_finite
from gptoss_dist.checkpoint.formats.companions import UnknownStopIds, carried_stop_ids, companions_to_carry
from gptoss_dist.checkpoint.formats.export import export, save_pretrained
from gptoss_dist.checkpoint.formats.pretrained import check_architecture, load_into, load_pretrained, open_pretrained
from gptoss_dist.checkpoint.info import CheckpointInfo, DataPlace, SkippedSamples, StepLoss, read_info
from gptoss_dist.checkpoint.rng import restore_rng
from gptoss_dist.checkpoint.saver import Saver, save
from gptoss_dist.checkpoint.skipped import merge_skipped, read_skipped, write_skipped
from gptoss_dist.checkpoint.store import (
    Retention,
    candidates,
    checkpoints,
    load_state,
    resolve,
    set_aside,
    step_of,
    tidy,
    verify,
)

Keep = Retention
"""The former name."""

__all__ = [
    "CheckpointInfo",
    "DataPlace",
    "Keep",
    "Retention",
    "Saver",
    "SkippedSamples",
    "StepLoss",
    "UnknownStopIds",
    "candidates",
    "carried_stop_ids",
    "check_architecture",
    "checkpoints",
    "companions_to_carry",
    "export",
    "load_into",
    "load_pretrained",
    "load_state",
    "merge_skipped",
    "not_finite",
    "open_pretrained",
    "read_info",
    "read_skipped",
    "resolve",
    "restore_rng",
    "save",
    "save_pretrained",
    "set_aside",
    "step_of",
    "tidy",
    "verify",
    "write_skipped",
]
