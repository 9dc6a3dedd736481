"""Rotary position embedding with YaRN, as GPT-OSS applies it.

Shapes: B batch, H heads, T tokens, C head_dim, R = C / 2 rotated pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptoss_dist.model.config import FULL, ModelConfig


def inverse_frequencies(config: ModelConfig, layer_type: str) -> tuple[Tensor, float]:
    """Return radians per token of each rotated pair, [R] float32 on CPU, and the factor on cos and sin (YaRN's mscale).

    Long wavelengths are interpolated by `factor`, short ones are kept, with a linear ramp between the dimensions that
    turn `beta_fast` and `beta_slow` times over the original context (YaRN, arXiv:2309.00071, section 3.2). On full
    layers the slowest `rope_pruned_fraction` of the pairs does not turn at all (p-RoPE, arXiv:2410.06205).
    """
    pairs = config.head_dim // 2
    # Named explicitly: the model may be under construction on the meta device.
    index_R = torch.arange(pairs, dtype=torch.float32, device="cpu")
    exponent_R = 2 * index_R / config.head_dim
    extrapolated_R = 1.0 / config.rope_theta**exponent_R
    scaling, factor = config.rope_scaling, 1.0
    inverse_R = extrapolated_R
    if scaling is not None:

        def dimension(rotations: float) -> float:
            turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
            return config.head_dim * math.log(turns) / (2 * math.log(config.rope_theta))

        low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, config.head_dim - 1)
        span = (high - low) or 0.001
        ramp_R = ((index_R - low) / span).clamp(0, 1)
        inverse_R = extrapolated_R / scaling.factor * ramp_R + extrapolated_R * (1 - ramp_R)
        if scaling.factor > 1:
            factor = 0.1 * math.log(scaling.factor) + 1.0
    pruned = round(config.rope_pruned_fraction * pairs) if layer_type == FULL else 0
    if pruned:
        inverse_R = inverse_R.clone()
        inverse_R[pairs - pruned :] = 0.0
    return inverse_R, factor


class RotaryTables:
    """Tables of cos and sin by layer type, computed once per forward pass for the positions at hand."""

    def __init__(self, config: ModelConfig) -> None:
        self.frequencies = {kind: inverse_frequencies(config, kind) for kind in sorted(set(config.attention_types))}

    def __call__(self, position_T: Tensor, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
        """Return {layer_type: (cos [T, R], sin [T, R])} in `dtype`, on the positions' device.

        Positions [B, T], if those of the sequences differ, give tables [B, T, R].
        """
        tables = {}
        for kind, (inverse_R, factor) in self.frequencies.items():
            if inverse_R.device != position_T.device:  # once: a copy at every step would make the host wait
                inverse_R = inverse_R.to(position_T.device)
                self.frequencies[kind] = (inverse_R, factor)
            angle_TR = position_T.float()[..., None] * inverse_R
            # An unrotated pair keeps mscale as well: the factor belongs to the attention logits, not to the rotation.
            tables[kind] = ((angle_TR.cos() * factor).to(dtype), (angle_TR.sin() * factor).to(dtype))
        return tables


def apply_rotary(x_BTHC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the pairs (i, i + R) of the last dimension.

    Args:
        x_BTHC: Queries or keys.
        cos_TR: Cosine of each position's angles; [B, T, R] if positions differ between sequences.
        sin_TR: Sine of each position's angles, likewise.

    Returns:
        A tensor like x.
    """
    cos_T1R, sin_T1R = cos_TR[..., None, :], sin_TR[..., None, :]
    if not torch.is_grad_enabled():
        return _rotate(x_BTHC, cos_T1R, sin_T1R, 1)
    return _Rotation.apply(x_BTHC, cos_T1R, sin_T1R)


def _rotate(x_BTHC: Tensor, cos_T1R: Tensor, sin_T1R: Tensor, sign: int) -> Tensor:
    a, b = x_BTHC.chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # the compiler fuses this, and dislikes out=
        return torch.cat((a * cos_T1R - b * sin_T1R * sign, b * cos_T1R + a * sin_T1R * sign), dim=-1)
    out_BTHC = torch.empty_like(x_BTHC, memory_format=torch.contiguous_format)
    out_a, out_b = out_BTHC.chunk(2, dim=-1)
    torch.mul(a, cos_T1R, out=out_a).addcmul_(b, sin_T1R, value=-sign)
    torch.mul(b, cos_T1R, out=out_b).addcmul_(a, sin_T1R, value=sign)
    return out_BTHC


class _Rotation(torch.autograd.Function):
    """A rotation's gradient is the rotation back: two passes over memory instead of the ten of plain autograd."""

    @staticmethod
    def forward(ctx, x_BTHC: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1R, sin_T1R)
        return _rotate(x_BTHC, cos_T1R, sin_T1R, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_BTHC: Tensor):
        cos_T1R, sin_T1R = ctx.saved_tensors
        return _rotate(dout_BTHC, cos_T1R, sin_T1R, -1), None, None
