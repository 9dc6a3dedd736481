"""Weights that stay gathered over many forward passes, as in generation: gathered once, and not once per token.

FSDP2 frees what it gathered behind each block, since in training it could not hold all blocks at once. A token of
generation needs all of them again, and each holds little else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

from gptoss_dist.distributed.hosts import this_host
from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.model.transformer import GptOss

SHARE = 0.5
"""Of the memory that is free, gathered weights may take so much: activations and the cache need some too."""


@contextmanager
def keep_gathered(model: GptOss, ranks: Ranks, expert_parallel: int, itemsize: int) -> Iterator[bool]:
    """Keep what forward passes gather until the end of the context, if it fits on every rank; collective.

    Args:
        model: A model whose blocks, and experts, FSDP2 shards and frees behind their forward pass.
        ranks: This process.
        expert_parallel: Over how many processes experts are distributed: a process gathers its own only.
        itemsize: Bytes of a gathered element.

    Yields:
        Whether it fits.
    """
    elements = sum(p.numel() // (expert_parallel if ".experts." in name else 1) for name, p in model.named_parameters())
    fits = elements * itemsize < SHARE * free_bytes(ranks)
    fits = bool(ranks.sum(torch.tensor(float(fits), device=ranks.device)) == ranks.world_size)
    sharded = [module for module in model.model.modules() if isinstance(module, FSDPModule)]
    if fits:
        for module in sharded:
            module.set_reshard_after_forward(False, recurse=False)
    try:
        yield fits
    finally:
        if fits:
            for module in sharded:
                module.set_reshard_after_forward(True, recurse=False)
                module.reshard()


def free_bytes(ranks: Ranks) -> int:
    """Return the memory that this process may take: of its GPU, or its part of what is free on this machine."""
    if ranks.device.type == "cuda":
        kept = torch.cuda.memory_reserved(ranks.device) - torch.cuda.memory_allocated(ranks.device)
        return torch.cuda.mem_get_info(ranks.device)[0] + kept
    limits = [_available()]
    folder = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no control groups of version 2, or "max"
        limits.append(int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
    return max(min(limits), 0) // max(ranks.hosts.count(this_host()), 1)


def _available() -> int:
    """Return the bytes that Linux could give without swapping, or 0 if it does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
