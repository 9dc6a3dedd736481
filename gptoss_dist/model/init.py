"""Initial weights as a function of (seed, parameter name, global expert index).

Any sharding of the same seed therefore starts from the same weights: a rank draws exactly the experts it holds, and
keeps its rows of everything else.
"""

from __future__ import annotations

import hashlib
import itertools

import torch
from torch import Tensor, nn

from gptoss_dist.model.config import ModelConfig


def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter and buffer of a whole (unsharded, materialised) `GptOss` in place."""
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

    Args:
        out: the part to fill, on any device, float32 or bfloat16.
        name: the parameter's name in the whole model, such as `model.layers.0.self_attn.q_proj.weight`.
        shape: the whole parameter's shape.
        config: gives the standard deviation and the variants.
        seed: the run's seed.
        offset: index of out[0, ..., 0] in the whole parameter; None if `out` is the whole.

    Values are drawn in float32 on the CPU, so that they do not depend on the device.
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
    """As transformers initialises GPT-OSS: norms 1, biases 0; weights, router bias and sinks normal (None).

    The router's selection bias is a bias like any other: 0.
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
