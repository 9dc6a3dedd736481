"""How the processes of a run are arranged.

    world = replicate x shard               for everything but the experts
    world = replicate x (shard / ep) x ep   for the experts
    world = data x cp                       for the samples

Data is split over world / cp groups (`data_parallel`), and each sequence over the `cp` processes of a group
(`context_parallel`), which have the same samples.

`shard` processes hold one copy of the weights between them, `replicate` such copies exist (HSDP). Each expert lives on
one process of every group of `ep` neighbours (`expert_parallel`), and what that process holds of it is sharded once
more over the shard / ep groups. `ep` is the innermost dimension: the processes that exchange tokens in every layer have
consecutive ranks, so they sit on one node wherever ep divides its ranks.

`cp` is innermost too: the three lines are views of the same processes. Experts do not mind where in which sequence a
token stands, so ep neighbours may be cp neighbours or not, and what both exchange in every layer stays on one node.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import overload

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from gptoss_dist.config import ParallelConfig


@dataclass(frozen=True)
class DeviceLayout:
    """The degrees of parallelism of a run; their product rules hold by construction (`plan_layout`)."""

    replicate: int
    shard: int
    expert_parallel: int
    context_parallel: int = 1

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.replicate * self.shard

    @property
    def expert_shard(self) -> int:
        """Number of processes over which each expert's weights are sharded."""
        return self.shard // self.expert_parallel

    @property
    def data_parallel(self) -> int:
        """Number of groups of processes that have different samples."""
        return self.world_size // self.context_parallel

    def data_rank(self, rank: int) -> int:
        """Return which of these groups, and so which samples, a process has."""
        return rank // self.context_parallel

    def __str__(self) -> str:
        experts = f"experts {self.expert_parallel} x {self.expert_shard}"
        context = f", context {self.context_parallel}" if self.context_parallel > 1 else ""
        return f"replicate {self.replicate} x shard {self.shard} ({experts}){context}"


@dataclass(frozen=True)
class Meshes:
    """The device meshes of a layout.

    FSDP shards over the last dimension and, if there are two, replicates over the first.
    """

    dense: DeviceMesh
    """`shard`, or `replicate` x `shard`: for everything but the experts."""
    experts: DeviceMesh
    """`expert_shard`, or `replicate` x `expert_shard`: for the experts that one process holds."""
    expert_parallel: DeviceMesh
    """`expert`: the processes among which this one's tokens find every expert."""
    context: DeviceMesh | None = None
    """`context`: the processes that have the same samples, and a part of each sequence; None if this one has all."""


def ranks_per_node(world_size: int) -> int:
    """Return the number of processes on each machine, as the launcher says; without one, that of all processes."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world_size)


def plan_layout(
    config: ParallelConfig, num_experts: int, world_size: int, node_size: int | None = None
) -> DeviceLayout:
    """Check `config` against the number of processes and experts, and resolve `auto`.

    Args:
        config: The degrees of parallelism that were asked for.
        num_experts: Experts per layer.
        world_size: Processes in all.
        node_size: Processes per machine, for `expert_parallel=auto`; None asks the launcher.

    Raises:
        ValueError: The degrees do not fit; the message lists those that would.
    """
    replicate, shard = config.replicate, shard_size(config, world_size)
    possible = [n for n in _divisors(shard) if num_experts % n == 0]
    if config.expert_parallel == "auto" and config.experts != "megablocks":
        expert_parallel = 1  # the only degree that these experts have
    elif config.expert_parallel == "auto":
        node_size = node_size or ranks_per_node(world_size)
        expert_parallel = max(n for n in possible if node_size % n == 0)
    else:
        expert_parallel = config.expert_parallel
    if expert_parallel not in possible:
        raise ValueError(
            f"parallel.expert_parallel={expert_parallel} must divide the {num_experts} experts and the {shard} "
            f"processes of a shard group ({world_size} processes / parallel.replicate={replicate}); "
            f"possible: {_listed(possible)}, or auto"
        )
    if expert_parallel > 1 and config.experts != "megablocks":
        raise ValueError(
            f"parallel.expert_parallel={expert_parallel} needs --parallel.experts megablocks, not {config.experts}"
        )
    count_data_groups(config, world_size)
    return DeviceLayout(replicate, shard, expert_parallel, config.context_parallel)


def shard_size(config: ParallelConfig, world_size: int) -> int:
    """Return the number of processes that hold a copy of the weights between them.

    Raises:
        ValueError: `replicate` does not divide the processes; the message lists what does.
    """
    if config.replicate < 1 or world_size % config.replicate:
        raise ValueError(
            f"parallel.replicate={config.replicate} does not divide the {world_size} processes; "
            f"possible: {_listed(_divisors(world_size))}"
        )
    return world_size // config.replicate


def count_data_groups(config: ParallelConfig, world_size: int) -> int:
    """Return the number of groups of processes that have different samples.

    Args:
        config: The degrees of parallelism that were asked for.
        world_size: Processes in all.

    Raises:
        ValueError: A degree does not divide the processes; the message lists what does.
    """
    shard = shard_size(config, world_size)
    if config.context_parallel < 1 or shard % config.context_parallel:
        raise ValueError(
            f"parallel.context_parallel={config.context_parallel} must divide the {shard} processes of a shard group "
            f"({world_size} processes / parallel.replicate={config.replicate}); possible: {_listed(_divisors(shard))}"
        )
    return world_size // config.context_parallel


def spanned_machines(layout: DeviceLayout, node_size: int | None = None) -> str | None:
    """Return a line about groups of expert or context parallelism that do not fit into one machine, if there are any.

    Args:
        layout: The degrees of parallelism.
        node_size: Processes per machine; None asks the launcher.
    """
    node_size = node_size or ranks_per_node(layout.world_size)
    found = [
        f"{name}={degree} spans machines of {node_size} processes: {what} cross the network"
        for name, degree, what in (
            ("expert_parallel", layout.expert_parallel, "all-to-alls"),
            ("context_parallel", layout.context_parallel, "keys and values"),
        )
        if node_size % degree
    ]
    return "; ".join(found) or None


def build_meshes(layout: DeviceLayout, device_type: str) -> Meshes:
    """Create the process groups of a layout; collective.

    The experts' dimensions are views of one mesh: FSDP composes its sharding with the one over `expert` only then.
    """
    dense_sizes, dense_names = [layout.shard], ["shard"]
    expert_sizes, expert_names = [layout.expert_shard], ["expert_shard"]
    if layout.replicate > 1:
        dense_sizes.insert(0, layout.replicate)
        dense_names.insert(0, "replicate")
        expert_sizes.insert(0, layout.replicate)
        expert_names.insert(0, "replicate")
    dense = init_device_mesh(device_type, tuple(dense_sizes), mesh_dim_names=tuple(dense_names))
    root = init_device_mesh(
        device_type, (*expert_sizes, layout.expert_parallel), mesh_dim_names=(*expert_names, "expert")
    )
    context = None
    if layout.context_parallel > 1:
        sizes = (layout.data_parallel, layout.context_parallel)
        context = init_device_mesh(device_type, sizes, mesh_dim_names=("data", "context"))["context"]
    return Meshes(dense, root[tuple(expert_names)], root["expert"], context)


@overload
def local(tensor: Tensor) -> Tensor: ...


@overload
def local(tensor: None) -> None: ...


def local(tensor: Tensor | None) -> Tensor | None:
    """Return this process's part of a sharded tensor; anything else as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
