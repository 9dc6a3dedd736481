"""Initial weights are a function of the seed, the parameter's name, and the expert's index in the whole model.

However a model is sharded, the same seed therefore starts it from the same weights: a rank draws the experts that it
holds, and draws everything else whole and keeps its part.
"""

from __future__ import annotations

import hashlib
import itertools

import torch
from torch import Tensor

from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.transformer import GptOss


def initialize(model: GptOss, seed: int) -> None:
    """Fill every parameter and buffer of a `GptOss` in place, which is neither sharded nor on the meta device."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        fill(tensor.data, name, tensor.shape, model.config, seed)


@torch.no_grad()
def fill(
    out: Tensor,
    name: str,
    shape: tuple[int, ...],
    config: ModelConfig,
    seed: int,
    offset: tuple[int, ...] | None = None,
) -> None:
    """Write the initial values of a rectangular part of one parameter or buffer into `out`.

    Values are drawn in float32 on the CPU, so that they do not depend on the device.

    Args:
        out: The part to fill, on any device, float32 or bfloat16.
        name: The parameter's name in the whole model, such as `model.layers.0.self_attn.q_proj.weight`.
        shape: The whole parameter's shape.
        config: Gives the standard deviation and the variants.
        seed: The run's seed.
        offset: Index of out[0, ..., 0] in the whole parameter; None if `out` is the whole.
    """
    constant = _constant(name, config)
    if constant is not None:
        out.fill_(constant)
        return
    offset = offset or (0,) * out.ndim
    if ".experts." in name:
        for e in range(out.shape[0]):
            out[e].copy_(_part(_normal(shape[1:], name, config, seed, offset[0] + e), offset[1:], out.shape[1:]))
    else:
        out.copy_(_part(_normal(shape, name, config, seed), offset, out.shape))


def _constant(name: str, config: ModelConfig) -> float | None:
    """Return the value that fills a parameter or buffer, or None if it is drawn from a normal distribution.

    As transformers initialises GPT-OSS, norms are 1 and biases 0 (the router's selection bias too); weights, the
    router's bias and sinks are drawn.
    """
    if name.endswith("norm.weight"):
        return 1.0
    if name.endswith(".sinks"):
        return 0.0 if config.sink_init == "zero" else None
    return 0.0 if name.endswith("bias") and not name.endswith("router.bias") else None


def _normal(shape: tuple[int, ...], name: str, config: ModelConfig, seed: int, expert: int | None = None) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}/{expert}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, config.initializer_range, generator=generator)


def _part(whole: Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    for dim, (start, length) in enumerate(zip(offset, shape)):
        whole = whole.narrow(dim, start, length)
    return whole
