"""The processes of a run: who this one is, on which device, and how the others are reached."""

from __future__ import annotations

import ctypes
import datetime
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gptoss_dist.distributed import launchers, rendezvous
from gptoss_dist.distributed.collectives import LocalError, all_gather_objects
from gptoss_dist.distributed.hosts import by_host, this_host


@dataclass(frozen=True)
class Ranks:
    """One process of the run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    hosts: tuple[str, ...] = ()
    """The name of each rank's machine."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only process that prints, tracks and writes common files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add `tensor` over all ranks, in place; no host synchronisation."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()


def init_distributed(timeout_s: float = 1800.0) -> Ranks:
    """Join the run that a launcher started (see `launchers.py`), or be a run of one process if there is none.

    On CPU it also sets, for the rest of the process, that the C library keeps freed memory.

    Args:
        timeout_s: How long the processes wait for each other, at the start and in a collective.

    Raises:
        LocalError: There are fewer GPUs than processes on this machine, or the processes did not meet.
        ValueError: The launcher does not say where the processes meet.
    """
    launchers.complete()
    rank, world_size, local_rank = rendezvous.check_variables(os.environ)
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise LocalError(
                f"LOCAL_RANK={local_rank} but this machine has {torch.cuda.device_count()} GPUs; "
                "start at most one process per GPU (torchrun --nproc_per_node)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        _tune_cpu_memory()
    dist.init_process_group(
        backend,
        store=rendezvous.open_store(rank, world_size, timeout_s),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    return Ranks(rank, local_rank, world_size, device, tuple(all_gather_objects(this_host())))


def _tune_cpu_memory() -> None:
    """Keep freed memory in the process, which saves a sixth of a training step on CPU (docs/log.md).

    A step frees and allocates the same gigabytes again and again. By default the C library hands large blocks back to
    the system every time, and getting them again costs a page fault per 4 KiB. The price: fragments count as used.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_TRIM_THRESHOLD, ... of malloc.h
    mallopt(trim_threshold, -1)  # never shrink the heap
    mallopt(mmap_max, 0)  # take large blocks from it too
    mallopt(arena_max, 1)  # for all threads: the heaps of further arenas are too small for large blocks


def exit_after_error(message: Callable[[], None], patience_s: float = 5.0) -> None:
    """Call `message`, and return when this process may exit because of a mistake.

    Rank 0 waits for the others to be ready to exit too, but not for long, as they may not have met the mistake. The
    processes find each other in a store that is rank 0's where it is not torchrun's: if rank 0 exited at once, a rank
    that is a moment behind would fail for that, with a traceback.

    Args:
        message: Reports the mistake.
        patience_s: The most seconds that rank 0 waits.
    """
    if not dist.is_initialized():
        return message()
    store, deadline = dist.distributed_c10d._get_default_store(), time.monotonic() + patience_s
    with suppress(dist.DistError):
        store.add("leaving", 1)
    message()
    while dist.get_rank() == 0 and store.add("leaving", 0) < dist.get_world_size() and time.monotonic() < deadline:
        time.sleep(0.02)


def silent_ranks(ranks: Ranks, patience_s: float) -> str:
    """Say which ranks seem to be lost, after a collective has failed; it takes `patience_s` seconds at most.

    A rank whose collective has failed leaves word in the store. Whoever has not done so when the time is over has
    ended, hangs, or is cut off. The store is a process of rank 0's host, and may be cut off itself.

    Args:
        ranks: This process.
        patience_s: Seconds that the others have to notice.

    Returns:
        Words for a message; empty if all have noticed.
    """
    missing = list(range(ranks.world_size))
    deadline, answered = time.monotonic() + patience_s, threading.Event()

    def ask() -> None:
        store = dist.distributed_c10d._get_default_store()
        with suppress(dist.DistError):
            store.set(f"failed/{ranks.rank}", "yes")
            while missing and time.monotonic() < deadline:
                missing[:] = [rank for rank in missing if not store.check([f"failed/{rank}"])]
                answered.set()
                time.sleep(0.1)

    # Without a network, the store's answer is waited for as long as for a collective.
    thread = threading.Thread(target=ask, name="silent-ranks", daemon=True)
    thread.start()
    thread.join(patience_s)
    time.sleep(max(0.0, deadline - time.monotonic()))
    if not answered.is_set():
        return f"no answer from {ranks.hosts[0]}, the host of rank 0"
    return f"no sign of life from {by_host(missing, ranks.hosts)}" if missing else ""


def seed_everything(seed: int, rank: int) -> None:
    """Seed python, numpy and torch; each rank gets another seed, because ranks draw noise for different samples."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def shut_down(exit_code: int = 0) -> None:
    """Leave the process group together, and end the process without running destructors.

    gloo's background threads sometimes abort the interpreter's tear-down after all work is done, which would turn a
    finished run into a failed one.
    """
    if dist.is_initialized():
        if exit_code == 0:
            dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
