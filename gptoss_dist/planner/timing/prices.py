"""Seconds of one operator on a device: the greater of its work over a rate and its bytes over a bandwidth.

`Hardware` is what the time line (`roofline.py`) asks. `DatasheetHardware` answers by a vendor's figures and the shares
of them that software reaches (`datasheets.py`), `Calibration` (`calibration.py`) by what was measured on the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from gptoss_dist.planner.hardware import Gpu, Network
from gptoss_dist.planner.timing.kinds import Kind, kind_of, label_of, moved_bytes
from gptoss_dist.planner.tracing.recorder import Operator

NEIGHBOURS = "neighbours"
"""The kind of an all-to-all in which some processes send nothing to each other, such as a step of a ring."""
SORT_PASSES = 8
"""How often a sort moves its bytes: a radix sort reads and writes keys and positions for every 8 bits of 32."""


class Hardware(Protocol):
    """A device, its host, and the links within a node."""

    @property
    def name(self) -> str:
        """What a user calls it."""

    @property
    def launch_s(self) -> float:
        """Seconds of the host per operator that has a kernel."""

    @property
    def host_sync_s(self) -> float:
        """Seconds that the host takes to notice that the device is done."""

    @property
    def runs_ahead(self) -> bool:
        """Whether the host issues operators before the device runs them; on a CPU both are one."""

    @property
    def network_share(self) -> float:
        """Share of the network's rate that collectives reach."""

    def compute_s(self, operator: Operator) -> float:
        """Return the device's seconds for an operator that is no collective."""

    def link_s(self, kind: str, sent: float, processes: int) -> float:
        """Return the seconds of a collective within a node.

        Args:
            kind: Such as `all-gather`, or NEIGHBOURS.
            sent: Bytes that each process sends.
            processes: How many take part.
        """


@dataclass(frozen=True)
class DatasheetHardware:
    """A GPU by its datasheet and `Gpu.efficiency`."""

    gpu: Gpu
    link_latency_s: float = 5e-6
    """Seconds of a collective within a node, before the first byte; an estimate."""
    runs_ahead: bool = True

    @property
    def name(self) -> str:
        """What a user calls it."""
        return self.gpu.name

    @property
    def launch_s(self) -> float:
        """Seconds of the host per operator that has a kernel."""
        return self.gpu.efficiency.kernel_launch_s

    @property
    def host_sync_s(self) -> float:
        """Seconds that the host takes to notice that the device is done."""
        return self.gpu.efficiency.host_sync_s

    @property
    def network_share(self) -> float:
        """Share of the network's rate that collectives reach."""
        return self.gpu.efficiency.network

    def compute_s(self, operator: Operator) -> float:
        """Return the device's seconds for an operator that is no collective."""
        kind = kind_of(operator)
        if kind is Kind.NOTHING:
            return 0.0
        passes = SORT_PASSES if kind is Kind.SORT else 1
        memory_s = passes * moved_bytes(operator) / (self.gpu.memory_bytes_per_s * self.gpu.efficiency.memory)
        if kind is Kind.GROUPED and operator.shapes[-1] == (1,):  # a dense network, here one expert
            kind = Kind.MATRIX
        return max(operator.flops / (self._peak(operator.dtype) * self._share(kind)), memory_s)

    def link_s(self, kind: str, sent: float, processes: int) -> float:
        """Return the seconds of a collective within a node."""
        efficiency = self.gpu.efficiency
        share = efficiency.all_to_all if kind == "all-to-all" else efficiency.link
        joined = processes <= self.gpu.link_gpus  # the others are reached through the host
        rate = self.gpu.link_bytes_per_s if joined else self.gpu.host_bytes_per_s
        return sent / (rate * share) + self.link_latency_s if processes > 1 else 0.0

    def _share(self, kind: Kind) -> float:
        efficiency = self.gpu.efficiency
        return {
            Kind.GROUPED: efficiency.grouped_gemm,
            Kind.ATTENTION_FORWARD: efficiency.attention_forward,
            Kind.ATTENTION_BACKWARD: efficiency.attention_backward,
        }.get(kind, efficiency.gemm)

    def _peak(self, dtype: torch.dtype | None) -> float:
        return self.gpu.fp32 if dtype in (torch.float32, torch.float64) else self.gpu.bf16


def price(operator: Operator, hardware: Hardware) -> float:
    """Return the seconds of one operator by itself, what the host spends on it included.

    Args:
        operator: No collective; `collective_s` prices those.
        hardware: What it runs on.
    """
    if kind_of(operator) is Kind.NOTHING:
        return 0.0
    return max(hardware.compute_s(operator), hardware.launch_s if hardware.runs_ahead else 0.0)


def collective_s(operator: Operator, hardware: Hardware, network: Network | None, node_size: int) -> float:
    """Return the seconds of one collective, by the ring model.

    Ranks are numbered node by node. A group within one node has the fast link alone. Of a ring through several nodes
    every process sends the same bytes, and as many rings as a node has members pass the network side by side: g ports
    share what goes out of the node. In an all-to-all every process has its own port for what leaves the node, and the
    link for the rest, and the slowest one counts: of a ring, as in context parallelism, the one at a node's border.
    Where not everybody sends to everybody, the link is as fast as in a ring.

    Args:
        operator: A collective.
        hardware: The device and its link.
        network: What joins the nodes; None if there is one.
        node_size: Processes per node.

    Raises:
        ValueError: The group spans several nodes, and no network is given.
    """
    nodes = {rank // node_size for rank in operator.group}
    kind, sent, size = label_of(operator), operator.sent, len(operator.group)
    over_link = NEIGHBOURS if 0 in operator.by_distance[1:] and any(operator.by_distance[1:]) else kind
    if len(nodes) == 1:
        return hardware.link_s(over_link, sent, size)
    if network is None:
        raise ValueError(f"network=None, but a collective joins {len(nodes)} nodes of {node_size}; name the network")
    local = max(1, size // len(nodes))
    port = network.bytes_per_s * hardware.network_share
    if kind == "all-to-all":
        both = ((outside / port, sent - outside) for outside in set(operator.leaving(node_size)))
        return max(max(out_s, hardware.link_s(over_link, rest, local)) for out_s, rest in both) + network.latency_s
    return max(sent / (local * port), hardware.link_s(kind, sent, local)) + (len(nodes) - 1) * network.latency_s
