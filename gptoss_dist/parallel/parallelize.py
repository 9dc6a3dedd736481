"""Wraps a plain model for training, from outside: experts -> sequences -> compile -> checkpointing -> shard."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from gptoss_dist.config import ParallelConfig, TrainConfig
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.transformer import GptOss
from gptoss_dist.ops.backends import AUTO, BF16_ONLY
from gptoss_dist.ops.compiler import missing_compiler
from gptoss_dist.ops.experts.grouped_experts import BACKENDS
from gptoss_dist.ops.precision import DTYPES
from gptoss_dist.parallel.context import split_sequences
from gptoss_dist.parallel.exchange import Exchange
from gptoss_dist.parallel.mesh import Meshes, local
from gptoss_dist.parallel.recompute import checkpoint_activations


def parallelize(model: GptOss, train: TrainConfig, parallel: ParallelConfig, meshes: Meshes) -> Exchange | None:
    """Prepare `model` (on the meta device, or materialised) for training on `meshes`; in place.

    Parameter names do not change at any step. Afterwards every parameter is a DTensor of its whole shape, and the
    gradients of the processes are *summed*: the loss of each process is a share of the global loss. The sum needs no
    factor for the experts, whose gradients hold the tokens of their whole expert-parallel group already.

    Returns:
        The all-to-alls between the experts, if they are distributed over processes.
    """
    exchange = place_experts(model, train.precision, parallel, meshes)
    if meshes.context is not None:
        split_sequences(model, meshes.context)
    wrap_blocks(model, train)
    # One process holds everything anyway: gathering it a second time for the backward pass would only cost time.
    reshard = parallel.reshard_after_forward and torch.distributed.get_world_size() > 1
    policy = MixedPrecisionPolicy(
        param_dtype=None if train.precision == "fp32" else DTYPES[train.precision], reduce_dtype=torch.float32
    )
    for layer in model.blocks:
        experts = layer.mlp.experts
        if exchange is not None:
            _shard(experts, meshes.experts, policy, reshard, stacks=experts)
        _shard(layer, meshes.dense, policy, reshard, stacks=experts)
    # The root's backward pass begins right after its forward pass ends: freeing what it gathered would be in vain.
    _shard(model, meshes.dense, policy, reshard=False)
    if exchange is not None:
        _prefetch(model)
    return exchange


def wrap_blocks(model: GptOss, train: TrainConfig) -> None:
    """Compile each block, and checkpoint every n-th one's activations, as the settings say; in place.

    Raises:
        ValueError: There is no compiler.
    """
    layers = model.blocks
    if train.compile:
        check_compiler(torch.cuda.is_available())
        # Before the checkpointing around it: torch.compile runs a checkpointed function eagerly, and without a word, if
        # anything in it breaks the graph, as the all-to-alls do.
        for layer in layers:
            layer.forward = torch.compile(  # type: ignore[method-assign]
                layer.forward, mode=train.compile_mode
            )
    if every := train.activation_checkpointing:
        for layer in layers[every - 1 :: every]:
            checkpoint_activations(layer, keep_large=train.keep_all_to_all)


def check_compiler(on_cuda: bool) -> None:
    """Refuse to compile without a compiler, which the first step would find out, when the run's folder exists already.

    Args:
        on_cuda: Whether Triton is to compile its launchers in C, instead of the whole in C++.

    Raises:
        ValueError: There is none.
    """
    if problem := missing_compiler(on_cuda):
        raise ValueError(f"train.compile=True {problem} or set --train.compile false")


def place_experts(model: GptOss, precision: str, parallel: ParallelConfig, meshes: Meshes) -> Exchange | None:
    """Swap in the experts that the settings name and distribute them over `meshes.expert_parallel`; in place.

    Returns:
        The all-to-alls between the experts, if they are distributed over processes.

    Raises:
        ValueError: megablocks cannot be imported, or the experts cannot be multiplied as the settings say.
    """
    _check_expert_gemm(parallel.expert_gemm, precision, model.config, meshes.dense.device_type)
    exchange = None
    if parallel.experts == "megablocks":
        try:
            from gptoss_dist.parallel.experts import use_megablocks
        except ImportError as error:
            raise ValueError(f"{error}; or choose --parallel.experts plain") from None
        exchange = use_megablocks(model, meshes.expert_parallel)
    for layer in model.blocks:
        for experts in (layer.mlp.experts, layer.mlp.shared_expert):
            if experts is not None:
                experts.backend = parallel.expert_gemm
    return exchange


def _check_expert_gemm(gemm: str, precision: str, model: ModelConfig, device_type: str) -> None:
    """Refuse by its key what `grouped_experts` would refuse in the first step, when the run's folder exists already."""
    if gemm == AUTO:
        return
    sizes = (model.hidden_size, model.intermediate_size)
    reason = BACKENDS[gemm].why_not(DTYPES[precision], sizes, torch.device(device_type))
    if reason is not None:
        remedy = "choose --parallel.expert_gemm auto"
        if reason == BF16_ONLY:
            remedy = f"set --train.precision bf16 or {remedy}"
        raise ValueError(f"parallel.expert_gemm={gemm} {reason}; {remedy}")


def _shard(
    module: nn.Module,
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy,
    reshard: bool,
    stacks: nn.Module | None = None,
) -> None:
    """Shard what is not yet sharded of `module` over the last dimension of `mesh`, and sum gradients over all of it.

    Args:
        reshard: Free gathered parameters after the forward pass.
        stacks: The part of `module` whose parameters are stacks of experts.
    """
    stacked = set(stacks.parameters()) if stacks is not None else set()
    sharded = fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=reshard,
        shard_placement_fn=lambda p: Shard(shard_dimension(local(p).shape, mesh.shape[-1])) if p in stacked else None,
        mp_policy=policy,
    )
    if mesh.size() == 1:
        sharded.set_custom_reduce_scatter(cast(Any, _NothingToReduce()))  # its class is a private one of torch
    else:
        sharded.set_gradient_divide_factor(1.0)
        # Without this gloo is asked for a pre-multiplied sum, which it does not have.
        sharded.set_force_sum_reduction_for_comms(True)


def shard_dimension(shape: tuple[int, ...], shards: int) -> int:
    """Return the dimension on which to shard a stack of experts.

    It is that of the experts, or if there are fewer of them than shards, the next one that divides evenly: sharding too
    few experts would pad each gather to the number of shards.
    """
    if shards > shape[0]:
        for dimension in range(1, len(shape)):
            if shape[dimension] % shards == 0:
                return dimension
    return 0


def _prefetch(model: GptOss) -> None:
    """Gather the next block's weights, its experts' too, while this one computes.

    FSDP would gather experts when their forward pass begins. It gathers ahead of the device as far as the host runs
    ahead of it, and the host waits in every layer to learn how many tokens go where.
    """
    root = cast(FSDPModule, model)
    blocks = [cast(FSDPModule, block) for block in model.blocks]
    pairs = [[cast(FSDPModule, block), cast(FSDPModule, block.mlp.experts)] for block in model.blocks]
    for module, upcoming in zip([root, *blocks], pairs):
        module.set_modules_to_forward_prefetch(upcoming)
    for module, upcoming in zip([root, *blocks[::-1]], pairs[::-1]):
        module.set_modules_to_backward_prefetch(upcoming)


class _NothingToReduce:
    """FSDP2's reduce-scatter for one process, whose sum over processes is its own part.

    One buffer is both the input and the output, and nothing is copied from one to the other.
    """

    def __init__(self) -> None:
        self.input: torch.Tensor | None = None

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return the input of a reduction, and at the next call the same buffer as its output."""
        if self.input is None:
            self.input = torch.empty(size, dtype=dtype, device=device)
            return self.input
        output, self.input = self.input, None
        assert output.numel() == math.prod(size), "FSDP2 no longer allocates input and output in turn"
        return output
