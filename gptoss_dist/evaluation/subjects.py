"""The model that an evaluation is of, in every process of a launch.

Each rank holds the whole model and works on a share of the texts; results are rank 0's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline import Tokenizer
from data_pipeline.command_line import print_line
from data_pipeline.command_line.mistakes import in_words, is_explained
from gptoss_dist.checkpoint import open_pretrained, read_info
from gptoss_dist.distributed import launchers
from gptoss_dist.distributed.collectives import LocalError
from gptoss_dist.distributed.processes import Ranks, exit_after_error, init_distributed, shut_down
from gptoss_dist.evaluation.options import ScoringOptions
from gptoss_dist.evaluation.results import Subject, subject_of
from gptoss_dist.inference.session import find_device
from gptoss_dist.model.transformer import GptOss
from gptoss_dist.ops.precision import DTYPES


@dataclass(frozen=True)
class Evaluated:
    """A model, and what there is to say of it."""

    model: GptOss
    tokenizer: Tokenizer
    subject: Subject
    folder: Path
    """Where its weights are."""
    is_checkpoint: bool
    """Whether that is a checkpoint of a run, and not an exported model."""

    @property
    def device(self) -> torch.device:
        """Where its weights are in this process."""
        return self.model.lm_head.weight.device

    def warn_of_length(self, length: int, ranks: Ranks) -> None:
        """Say once if a context is longer than the positions that the model was made for."""
        limit = self.model.config.max_position_embeddings
        if length > limit and ranks.is_main:
            print_line(
                f"warning: contexts of {length:,} tokens are longer than the {limit:,} positions that the model was "
                "made for (max_position_embeddings)",
                file=sys.stderr,
            )


def load(options: ScoringOptions, ranks: Ranks) -> Evaluated:
    """Load the model that `options` name, whole, in every process; collective.

    Raises:
        ValueError: There is none, or no tokenizer of this project beside it.
    """
    pretrained = open_pretrained(options.checkpoint)
    precision = options.precision or ("bf16" if ranks.device.type == "cuda" else "fp32")
    is_checkpoint = pretrained.format == "run"
    step = read_info(pretrained.folder)["step"] if is_checkpoint else 0
    return Evaluated(
        pretrained.build(DTYPES[precision], ranks.device),
        Tokenizer.load(pretrained.folder),
        subject_of(options.checkpoint, pretrained.folder, step),
        pretrained.folder,
        is_checkpoint,
    )


@contextmanager
def joined(device: str | None) -> Iterator[Ranks]:
    """Be one of the processes that a launcher started, or the only one, and leave them together at the end.

    In several processes a mistake is told once, and the exit code is 2.

    Args:
        device: What the user named, for a process without a launcher.

    Raises:
        ValueError: There is no such device.
    """
    launchers.complete()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks(0, 0, 1, find_device(device))
        return
    if device == "cpu" and torch.cuda.is_available():
        raise LocalError("device=cpu: several processes take the GPUs that are here; hide these, or start one process")
    ranks = init_distributed()
    try:
        yield ranks
    except Exception as error:
        if not is_explained(error):
            raise
        mistake, alone = in_words(error), isinstance(error, LocalError)
        exit_after_error(lambda: launchers.report_error_once(mistake, alone=alone))
        raise SystemExit(2) from None
    if dist.is_initialized():
        shut_down()
