"""A decoding step under torch.compile, and when it pays.

Compiling takes longer than most texts: on a CPU a few seconds for each layer, which a step then saves in thousandths.
`decoder_for` compiles unasked (`auto`) only where so many steps come that it pays; see `MANY_STEPS`.

Only steps of one token are compiled; prompts pass the model as it is. The cache has fixed shapes, so that one compiled
step serves all positions: full layers attend to the whole capacity under a mask. Another batch size, or another
capacity (they are rounded up, see `cache_for`), is compiled anew, once in a process.

On CUDA the step is captured in a CUDA graph (`reduce-overhead`), so that the host launches it as one. That has not run
on a GPU yet: it is unproven.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.generate import LanguageModel
from gptoss_dist.model.kv_cache import KVCache, LayerStep
from gptoss_dist.model.moe import Experts
from gptoss_dist.model.transformer import GptOss
from gptoss_dist.ops.compiler import missing_compiler

log = logging.getLogger(__name__)

Compile = Literal["auto"] | bool
"""Whether to compile the decoding step; `auto` where it pays and is possible."""

MANY_STEPS = 16_384
"""Steps of one shape from which on `auto` compiles: about what compiling costs (docs/log.md). On CUDA an estimate."""
FEW_COLUMNS = 2048
"""The largest capacity that `auto` compiles for: a compiled step attends to all of it, whatever is filled."""


def decoder_for(model: GptOss, compile: Compile, *, steps: int, columns: int, is_shared: bool = False) -> LanguageModel:
    """Return what makes the decoding steps of some texts: the model itself, or a `CompiledDecoding` of it.

    Args:
        model: The model.
        compile: What the user wants.
        steps: How many steps there will be with this batch size and about as many columns, earlier ones included.
        columns: Room for prompt and text.
        is_shared: Whether ranks hold parts of the model.

    Raises:
        ValueError: `compile` is true, and cannot be.
    """
    if compile is False or (compile == "auto" and (steps < MANY_STEPS or columns > FEW_COLUMNS)):
        return model
    problem = why_not(model, is_shared)
    if compile is True and problem:
        raise ValueError(f"compile=True {problem} or leave it out")
    return model if problem else CompiledDecoding(model, may_fail=compile == "auto")


def why_not(model: nn.Module, is_shared: bool = False) -> str | None:
    """Return why the decoding step of a model cannot be compiled, and what to do about it; None if it can."""
    plain = type(model) is GptOss and all(type(layer.mlp.experts) is Experts for layer in model.blocks)
    if is_shared or not plain or any(map(_is_wrapped, model.modules())) or any(map(_is_part, model.parameters())):
        return "needs a model of which this process holds all weights, as nothing has wrapped it; load it by itself,"
    return missing_compiler(on_cuda=next(model.parameters()).device.type == "cuda")


def _is_wrapped(module: nn.Module) -> bool:
    """Return whether somebody, such as FSDP2, ZeRO or activation checkpointing, looks in at a module's forward pass."""
    return "forward" in vars(module) or bool(module._forward_pre_hooks or module._forward_hooks)


def _is_part(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


class CompiledDecoding:
    """Stands in for a model where text is generated; see `model.generate.LanguageModel`."""

    fixed_shapes = True
    """What the caches that come here are to be made with."""

    def __init__(self, model: GptOss, *, may_fail: bool = False) -> None:
        """Wrap a model of which this process holds all weights; nothing is compiled before the first step.

        Args:
            model: The model.
            may_fail: Go on without, and say so in the log, if the compiler fails.
        """
        self.model, self.may_fail = model, may_fail
        self._on_cuda = next(model.parameters()).device.type == "cuda"
        self._step = torch.compile(self._logits, mode="reduce-overhead" if self._on_cuda else None, dynamic=False)

    @property
    def config(self) -> ModelConfig:
        """The model's architecture."""
        return self.model.config

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self.model.training

    def eval(self) -> object:
        """Switch the model to evaluation mode."""
        return self.model.eval()

    def train(self, mode: bool) -> object:
        """Switch the model to training mode, or with False to evaluation mode."""
        return self.model.train(mode)

    def __call__(self, input_ids_BT: Tensor, *, cache: KVCache, last_only: bool) -> Tensor:
        """Return logits [B, T or 1, V], and extend the cache in place."""
        if input_ids_BT.shape[1] > 1 or cache.length == 0 or not cache.fixed_shapes:
            return self.model(input_ids_BT, cache=cache, last_only=last_only)
        if self._on_cuda:
            _keep_in_place(cache)
        # A view of a longer tensor would be another shape to the compiler.
        arguments = (input_ids_BT.contiguous(), *cache.advance(input_ids_BT))
        try:
            return self._step(*arguments).clone()
        except torch._dynamo.exc.TorchDynamoException as error:
            if not self.may_fail:
                raise
            reason = " ".join(str(error).split())[:200]
            log.warning("the decoding step could not be compiled, and runs as it is: %s", reason)
            self._step = self._logits
            return self._step(*arguments)

    def _logits(self, input_ids_B1: Tensor, position_T: Tensor, steps: list[LayerStep]) -> Tensor:
        return self.model(input_ids_B1, cache=_Advanced(position_T, steps), last_only=True)


def _keep_in_place(cache: KVCache) -> None:
    """Let a CUDA graph use the cache where it lies: otherwise it copies it in at each step, and changes the copy."""
    for layer in cache.layers:
        for buffer in layer.buffers or ():
            torch._dynamo.mark_static_address(buffer, guard=False)


@dataclass
class _Advanced:
    """A cache that has counted in the new tokens already, outside of what is compiled."""

    position_T: Tensor
    steps: list[LayerStep]

    def advance(self, input_ids_BT: Tensor) -> tuple[Tensor, list[LayerStep]]:
        """Return what `KVCache.advance` returned."""
        return self.position_T, self.steps
