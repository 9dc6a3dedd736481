"""Wraps a plain model for training, from outside: experts -> activation checkpointing -> compile -> shard."""

from __future__ import annotations

import functools
import math

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from gptoss_dist.config import Config
from gptoss_dist.model.transformer import GptOss


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


def parallelize(model: GptOss, config: Config, mesh: DeviceMesh) -> GptOss:
    """Prepare `model` (on the meta device, or materialised) for training on `mesh`; in place.

    Parameter names do not change at any step. Afterwards every parameter is a DTensor sharded on dimension 0, and the
    gradients of the ranks are *summed*: the loss of each rank is a share of the global loss.
    """
    if config.parallel.experts == "megablocks":
        try:
            from gptoss_dist.parallel.experts import use_megablocks
        except ImportError as error:
            raise ValueError(f"{error}; or choose --parallel.experts plain") from None
        use_megablocks(model)
    layers = model.model.layers
    if every := config.train.activation_checkpointing:
        for layer in layers[every - 1 :: every]:
            # partial binds this layer's own forward; a closure over the loop variable would recompute the last one.
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    if config.train.compile:
        for layer in layers:
            layer.compile(mode=config.train.compile_mode)
    shard = functools.partial(
        fully_shard,
        mesh=mesh,
        # One process holds everything anyway: gathering it a second time for the backward pass would only cost time.
        reshard_after_forward=config.parallel.reshard_after_forward and mesh.size() > 1,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if config.train.precision == "bf16" else None, reduce_dtype=torch.float32
        ),
    )
    for layer in layers:
        shard(layer)
    shard(model)
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        if mesh.size() == 1:
            module.set_custom_reduce_scatter(_NothingToReduce())
        else:
            module.set_gradient_divide_factor(1.0)
            # Without this gloo is asked for a pre-multiplied sum, which it does not have.
            module.set_force_sum_reduction_for_comms(True)
    return model
