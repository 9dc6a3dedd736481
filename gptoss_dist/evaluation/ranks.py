"""An evaluation in one process or in all processes of a launch, each with the whole model and a share of the work."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from data_pipeline.command_line.mistakes import in_words, is_explained
from gptoss_dist.distributed import launchers
from gptoss_dist.distributed.collectives import LocalError, all_gather_objects, long_timeout_group
from gptoss_dist.distributed.processes import exit_after_error, init_distributed, shut_down

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """The part of this process in an evaluation."""

    rank: int = 0
    world_size: int = 1
    device: str | None = None
    """The GPU that belongs to this process; None leaves it to the user."""
    group: dist.ProcessGroup | None = None
    """A group of all ranks that waits for the slowest of them."""

    @property
    def is_main(self) -> bool:
        """Whether this process reports and writes."""
        return self.rank == 0

    def of(self, items: Sequence[T]) -> list[T]:
        """Return this process's share of what all have to do: every world_size-th item."""
        return list(items[self.rank :: self.world_size])

    def gather(self, results: list[T]) -> list[T]:
        """Return the results of all processes, those of rank 0 first; collective where there are ranks."""
        if self.world_size == 1:
            return results
        return [result for found in all_gather_objects(results, self.group) for result in found]


def run_on_ranks(work: Callable[[Share], None]) -> int:
    """Call `work` in this process, or in each process of a launch; without a launcher errors are the caller's.

    Args:
        work: The evaluation. Under a launcher every process calls the same collectives in it.

    Returns:
        The exit code. Under a launcher the process ends here instead.
    """
    launchers.complete()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        work(Share())
        return 0
    code = 0
    try:
        ranks = init_distributed()
        device = str(ranks.device) if ranks.device.type == "cuda" else None
        work(Share(ranks.rank, ranks.world_size, device, long_timeout_group()))
    except Exception as error:
        if not is_explained(error):
            raise
        mistake, alone = in_words(error), isinstance(error, LocalError)
        exit_after_error(lambda: launchers.report_error_once(mistake, alone=alone))
        code = 2
    shut_down(code)
    return code
