"""Settings of how a model is laid out over processes, and of the engine that owns its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_pipeline.command_line import ranged


@dataclass
class ParallelConfig:
    """How the model is laid out over processes."""

    replicate: int = ranged(1, at_least=1)
    """Copies of the sharded weights (HSDP): the processes of a copy shard it among themselves, and gradients are summed
    over copies. Divides the number of processes."""
    expert_parallel: int | Literal["auto"] = ranged(1, at_least=1)
    """Processes over which the experts of a layer are distributed; tokens travel to them. Divides the experts and the
    processes of a copy. `auto` takes the largest that also divides the processes of a machine, 1 with plain experts."""
    context_parallel: int = ranged(1, at_least=1)
    """Processes over which each sequence is split, for sequences longer than one device holds: neighbours, which have
    the same samples. Divides the processes of a copy; data.seq_len is at least twice as much."""
    experts: Literal["megablocks", "plain"] = "megablocks"
    """Token dispatch: megablocks (needs launch/install.sh), or the plain one of model/moe.py, without expert
    parallelism."""
    expert_gemm: Literal["auto", "grouped_mm", "grouped_gemm", "loop", "blocked"] = "auto"
    """The experts' matrix products, shared experts' too: `auto` is `grouped_mm` of torch on CUDA and `blocked` on CPU;
    `grouped_gemm` needs the package of that name, CUDA and bf16; `loop` is the slow reference."""
    reshard_after_forward: bool = True
    """Free gathered parameters after the forward pass (ZeRO-3); false keeps them until the backward pass (ZeRO-2), as
    one process always does."""


@dataclass
class EngineConfig:
    """Who owns the sharded parameters."""

    kind: Literal["auto", "fsdp", "deepspeed"] = "auto"
    """`fsdp`: torch FSDP2. `deepspeed`: DeepSpeed ZeRO. `auto` is `deepspeed` where one of the next two is set or the
    launcher of that name started the run (with its --launcher slurm or an MPI, name it), else `fsdp`."""
    zero_stage: int | None = None
    """What DeepSpeed shards: 1 optimizer state, 2 gradients too, 3 weights too; null takes the stage that
    engine.deepspeed names, else 2."""
    deepspeed: str | dict | None = None  # not dict[str, Any], whose texts jsonargparse would read as YAML
    """Further settings of DeepSpeed: a JSON file such as configs/deepspeed/zero3_offload.json (seen from the working
    directory), or its contents. Where they speak of what other settings decide (batch, precision, clipping, optimizer)
    they must agree or be left out."""
