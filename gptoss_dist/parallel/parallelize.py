"""Wraps a plain model for training, from outside: experts -> compile -> activation checkpointing -> shard."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from gptoss_dist.config import Config
from gptoss_dist.model.transformer import GptOss
from gptoss_dist.ops.backends import AUTO, BF16_ONLY
from gptoss_dist.ops.experts.grouped_experts import BACKENDS
from gptoss_dist.parallel.exchange import Exchange
from gptoss_dist.parallel.mesh import Meshes, local
from gptoss_dist.parallel.recompute import checkpoint_activations


def parallelize(model: GptOss, config: Config, meshes: Meshes) -> Exchange | None:
    """Prepare `model` (on the meta device, or materialised) for training on `meshes`; in place.

    Parameter names do not change at any step. Afterwards every parameter is a DTensor of its whole shape, and the
    gradients of the processes are *summed*: the loss of each process is a share of the global loss. The sum needs no
    factor for the experts, whose gradients hold the tokens of their whole expert-parallel group already.

    Returns:
        The all-to-alls between the experts, if they are spread over processes.
    """
    layers = model.model.layers
    exchange = place_experts(model, config, meshes)
    wrap_blocks(model, config)
    for layer in layers:
        experts = layer.mlp.experts
        if exchange is not None:
            _shard(experts, meshes.experts, config, stacks=experts)
        _shard(layer, meshes.dense, config, stacks=experts)
    _shard(model, meshes.dense, config, root=True)
    if exchange is not None:
        _prefetch(model)
    return exchange


def wrap_blocks(model: GptOss, config: Config) -> None:
    """Compile each block, and checkpoint every n-th one's activations, as the settings say; in place."""
    layers = model.model.layers
    if config.train.compile:
        # Before the checkpointing around it: torch.compile runs a checkpointed function eagerly, and without a word, if
        # anything in it breaks the graph, as the all-to-alls do.
        for layer in layers:
            layer.forward = torch.compile(layer.forward, mode=config.train.compile_mode)
    if every := config.train.activation_checkpointing:
        for layer in layers[every - 1 :: every]:
            checkpoint_activations(layer, keep_large=config.train.keep_all_to_all)


def place_experts(model: GptOss, config: Config, meshes: Meshes) -> Exchange | None:
    """Swap in the experts that the settings name and spread them over `meshes.expert_parallel`; in place.

    Returns:
        The all-to-alls between the experts, if they are spread over processes.

    Raises:
        ValueError: megablocks cannot be imported, or the experts cannot be multiplied as the settings say.
    """
    _check_expert_gemm(config, meshes.dense.device_type)
    exchange = None
    if config.parallel.experts == "megablocks":
        try:
            from gptoss_dist.parallel.experts import use_megablocks
        except ImportError as error:
            raise ValueError(f"{error}; or choose --parallel.experts plain") from None
        exchange = use_megablocks(model, meshes.expert_parallel)
    for layer in model.model.layers:
        for experts in (layer.mlp.experts, layer.mlp.shared_expert):
            if experts is not None:
                experts.backend = config.parallel.expert_gemm
    return exchange


def _check_expert_gemm(config: Config, device_type: str) -> None:
    """Refuse by its key what `grouped_experts` would refuse in the first step, when the run's folder exists already."""
    gemm = config.parallel.expert_gemm
    if gemm == AUTO:
        return
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    sizes = (config.model.hidden_size, config.model.intermediate_size)
    reason = BACKENDS[gemm].why_not(dtype, sizes, torch.device(device_type))
    if reason is not None:
        remedy = "choose --parallel.expert_gemm auto"
        if reason == BF16_ONLY:
            remedy = f"set --train.precision bf16 or {remedy}"
        raise ValueError(f"parallel.expert_gemm={gemm} {reason}; {remedy}")


def _shard(
    module: nn.Module, mesh: DeviceMesh, config: Config, stacks: nn.Module | None = None, root: bool = False
) -> None:
    """Shard what is not yet sharded of `module` over the last dimension of `mesh`, and sum gradients over all of it.

    Args:
        stacks: the part of it whose parameters are stacks of experts.
        root: the backward pass begins right after its forward pass ends, so that freeing what it gathered is in vain.
    """
    # One process holds everything anyway: gathering it a second time for the backward pass would only cost time.
    reshard = config.parallel.reshard_after_forward and torch.distributed.get_world_size() > 1 and not root
    stacked = set(stacks.parameters()) if stacks is not None else ()
    fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=reshard,
        shard_placement_fn=lambda p: Shard(shard_dimension(local(p).shape, mesh.shape[-1])) if p in stacked else None,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if config.train.precision == "bf16" else None, reduce_dtype=torch.float32
        ),
    )
    if mesh.size() == 1:
        module.set_custom_reduce_scatter(_NothingToReduce())
    else:
        module.set_gradient_divide_factor(1.0)
        # Without this gloo is asked for a pre-multiplied sum, which it does not have.
        module.set_force_sum_reduction_for_comms(True)


def shard_dimension(shape: tuple[int, ...], shards: int) -> int:
    """The dimension on which to shard a stack of experts: the experts, or if there are fewer of them than shards, the
    next one that divides evenly. Sharding too few experts would pad each gather to the number of shards."""
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
    blocks = list(model.model.layers)
    pairs = [[block, block.mlp.experts] for block in blocks]
    for module, upcoming in zip([model, *blocks], pairs):
        module.set_modules_to_forward_prefetch(upcoming)
    for module, upcoming in zip([model, *blocks[::-1]], pairs[::-1]):
        module.set_modules_to_backward_prefetch(upcoming)


class _NothingToReduce:
    """FSDP2's reduce-scatter for one process, whose sum over processes is its own part: one buffer is both the input
    and the output, and nothing is copied from one to the other."""

    def __init__(self) -> None:
        self.input = None

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Called in turn for the input and for the output of each reduction, which are of one size."""
        if self.input is None:
            self.input = torch.empty(size, dtype=dtype, device=device)
            return self.input
        output, self.input = self.input, None
        assert output.numel() == math.prod(size), "FSDP2 no longer allocates input and output in turn"
        return output
