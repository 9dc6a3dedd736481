"""How fast two processes of this machine exchange tensors."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from data_pipeline.disk import write_file_atomically
from data_pipeline.foreign import read_json
from gptoss_dist.planner.timing.calibration import Curve

PROCESSES = 2
REPEATS = 7


def measure_collectives(device: torch.device, messages: tuple[int, ...]) -> dict[str, Curve]:
    """Return bytes/s that each of two processes sends, by kind of collective and bytes.

    Two processes are started, with gloo, or nccl on CUDA devices.

    Args:
        device: A CPU, or any CUDA device: process n takes the n-th. Without a second one nothing is measured.
        messages: Bytes that a process sends.

    Returns:
        A curve each for `all-gather`, `reduce-scatter`, `all-reduce` and `all-to-all`.
    """
    if device.type == "cuda" and torch.cuda.device_count() < PROCESSES:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (device.type, messages, folder), nprocs=PROCESSES)
        found = read_json(Path(folder) / "found.json", dict[str, list[float]])
    sizes = [float(size) for size in messages]
    return {kind: Curve(sizes, [s / t for s, t in zip(sizes, seconds, strict=True)]) for kind, seconds in found.items()}


def _work(rank: int, device_type: str, messages: tuple[int, ...], folder: str) -> None:
    # torch 2.13 renamed two functions; what the older releases know, it warns of.
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
    )
    try:
        found = {kind: [_seconds(call, device) for call in calls] for kind, calls in _calls(messages, device).items()}
        if rank == 0:
            write_file_atomically(Path(folder) / "found.json", json.dumps(found).encode())
    finally:
        dist.destroy_process_group()


def _calls(messages: tuple[int, ...], device: torch.device) -> dict[str, list[Callable[[], object]]]:
    """Return the collectives in which each of two processes sends as many bytes as a message has."""

    def bound(collective: Callable[..., object], out: Tensor, data: Tensor) -> Callable[[], object]:
        return lambda: collective(out, data)

    gathers, scatters, reductions, exchanges = [], [], [], []
    for size in messages:
        part, whole = torch.ones(size // 4, device=device), torch.ones(size // 2, device=device)
        gathers.append(bound(dist.all_gather_into_tensor, whole, part))
        scatters.append(bound(dist.reduce_scatter_tensor, part, whole))
        # Of two processes each sends 2 x 1/2 of what is reduced, and half of what is exchanged.
        reductions.append(bound(lambda out, _: dist.all_reduce(out), part, part))
        exchanges.append(bound(dist.all_to_all_single, torch.empty_like(whole), whole))
    return {
        "all-gather": gathers,
        "reduce-scatter": scatters,
        "all-reduce": reductions,
        "all-to-all": exchanges,
    }


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a collective, by the wall's clock."""
    found = []
    for _ in range(REPEATS + 2):
        dist.barrier()
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begin)
    return statistics.median(found[2:])
