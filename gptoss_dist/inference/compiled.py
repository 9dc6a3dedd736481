"""A decoding step under torch.compile, for who generates much with one model: compiling takes longer than a short text.

    model = CompiledDecoding(model)
    generate(model, ids, max_new_tokens=2000)

Only steps of one token are compiled; prompts pass the model as it is. The cache has fixed shapes, so that one compiled
step serves all positions: full layers attend to the whole capacity under a mask. Another batch size, or another
capacity (they are rounded up, see `generate`), is compiled anew.

On CUDA the step is captured in a CUDA graph (`reduce-overhead`), so that the host launches it as one. That has not run
on a GPU yet: it is unproven.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.kv_cache import KVCache, LayerStep
from gptoss_dist.model.transformer import GptOss


class CompiledDecoding:
    """Stands in for a model where text is generated; see `model.generate.LanguageModel`."""

    fixed_shapes = True
    """What the caches that come here are to be made with."""

    def __init__(self, model: GptOss) -> None:
        """Wrap a model of which this process holds all weights; nothing is compiled before the first step."""
        self.model = model
        on_cuda = next(model.parameters()).device.type == "cuda"
        self._step = torch.compile(self._logits, mode="reduce-overhead" if on_cuda else None, dynamic=False)

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
        # A view of a longer tensor would be another shape to the compiler.
        return self._step(input_ids_BT.contiguous(), *cache.advance(input_ids_BT)).clone()

    def _logits(self, input_ids_B1: Tensor, position_T: Tensor, steps: list[LayerStep]) -> Tensor:
        return self.model(input_ids_B1, cache=_Advanced(position_T, steps), last_only=True)


@dataclass
class _Advanced:
    """A cache that has counted in the new tokens already, outside of what is compiled."""

    position_T: Tensor
    steps: list[LayerStep]

    def advance(self, input_ids_BT: Tensor) -> tuple[Tensor, list[LayerStep]]:
        """Return what `KVCache.advance` returned."""
        return self.position_T, self.steps
