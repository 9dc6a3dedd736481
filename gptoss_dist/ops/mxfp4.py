"""MXFP4, the format of GPT-OSS's published expert weights: 4-bit floats in groups of 32 that share a scale.

A value is `code * 2^(scale - 127)`. Codes are E2M1 floats (0, 0.5, 1, 1.5, 2, 3, 4, 6, and a sign bit), scales are E8M0
bytes: powers of two (OCP Microscaling Formats v1.0, 2023). Groups run along the last dimension. A byte holds two codes,
the low nibble comes first.

Shapes: G groups, each 32 values, 16 bytes (B) and one scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 32
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CHUNK = 1 << 17
"""Values encoded at a time: what the intermediate results take fits into a core's cache."""


class Mxfp4(NamedTuple):
    """Packed values."""

    blocks: Tensor
    """uint8 [..., G, 16]: two codes per byte."""
    scales: Tensor
    """uint8 [..., G]: exponents plus 127."""


def encode(x: Tensor, *, search: bool = False) -> Mxfp4:
    """Pack `x`, rounding to the nearest code, ties to the even one, and saturating at the largest.

    The scale is that of OCP's conversion: the largest magnitude's exponent less 2. Values between 6 and 8 times it
    become 6. What was packed once is packed again without a change of value.

    Args:
        x: Values [..., 32 G], bfloat16 or float32 (other floats are cast to float32). They are packed on the CPU.
        search: Try the next larger and smaller scale too, and take the one with the least squared error.

    Raises:
        ValueError: The last dimension is not made of whole groups, or a value is not finite.
    """
    if x.shape[-1] % GROUP:
        raise ValueError(f"a last dimension of {x.shape[-1]} cannot be packed in groups of {GROUP}")
    x = x if x.dtype in (torch.bfloat16, torch.float32) else x.float()
    x_GV = x.detach().cpu().reshape(-1, GROUP)
    blocks_GB = torch.empty(len(x_GV), GROUP // 2, dtype=torch.uint8)
    scales_G = torch.empty(len(x_GV), dtype=torch.uint8)
    if not x_GV.isfinite().all():
        raise ValueError("a value that is not finite cannot be packed")
    pack = _encode_searching if search else _encode
    rows = CHUNK // GROUP
    for part, blocks, scales in zip(x_GV.split(rows), blocks_GB.split(rows), scales_G.split(rows)):
        pack(part, blocks, scales)
    groups = x.shape[-1] // GROUP
    return Mxfp4(blocks_GB.view(*x.shape[:-1], groups, GROUP // 2), scales_G.view(*x.shape[:-1], groups))


def decode(packed: Mxfp4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values, [..., 32 G]. This is exact in float32, and in bfloat16 too, save for its subnormals."""
    pairs = torch.tensor([[_value(byte & 15), _value(byte >> 4)] for byte in range(256)])
    values = pairs[packed.blocks.int()].flatten(-2)  # [..., G, 32]
    values *= torch.exp2(packed.scales.float() - 127)[..., None]
    return values.flatten(-2).to(dtype)


def error(x: Tensor, packed: Mxfp4) -> float:
    """Return the relative error of what was packed: the norm of what was lost over the norm of `x`."""
    x = x.double()
    return float((decode(packed) - x).norm() / x.norm().clamp(min=1e-300))


def _value(code: int) -> float:
    return -VALUES[code & 7] if code & 8 else VALUES[code]


def _encode(x_GV: Tensor, blocks_GB: Tensor, scales_G: Tensor) -> None:
    bits_GV, mantissa = _magnitudes(x_GV)
    largest_G = _largest(bits_GV)
    scale_G = ((largest_G >> mantissa) - 2).clamp_(min=0)
    _round(x_GV, bits_GV, mantissa, scale_G, blocks_GB)
    scales_G.copy_(scale_G)
    _repair_tiny(x_GV, largest_G, mantissa, blocks_GB, scales_G)


def _encode_searching(x_GV: Tensor, blocks_GB: Tensor, scales_G: Tensor) -> None:
    bits_GV, mantissa = _magnitudes(x_GV)
    largest_G = _largest(bits_GV)
    least_G = torch.full(scales_G.shape, torch.inf, dtype=torch.float64)
    for offset in (-2, -1, -3):  # The usual one comes first: it stays where another is not better.
        scale_G = ((largest_G >> mantissa) + offset).clamp_(min=0)
        blocks, scales = torch.empty_like(blocks_GB), scale_G.to(torch.uint8)
        _round(x_GV, bits_GV, mantissa, scale_G, blocks)
        _repair_tiny(x_GV, largest_G, mantissa, blocks, scales)
        error_G = (decode(Mxfp4(blocks[:, None], scales[:, None])) - x_GV).double().square_().sum(-1)
        better_G = error_G < least_G
        least_G[better_G] = error_G[better_G]
        scales_G[better_G] = scales[better_G]
        blocks_GB[better_G] = blocks[better_G]


def _magnitudes(x_GV: Tensor) -> tuple[Tensor, int]:
    """Return the bits of |x| as integers, and how many of them are mantissa."""
    if x_GV.dtype == torch.bfloat16:
        return x_GV.view(torch.int16) & 0x7FFF, 7
    return x_GV.view(torch.int32) & 0x7FFFFFFF, 23


def _largest(bits_GV: Tensor) -> Tensor:
    """Return each group's largest value. It is found by halving, because torch reduces short rows slowly."""
    while bits_GV.shape[-1] > 1:
        bits_GV = torch.maximum(*bits_GV.chunk(2, -1))
    return bits_GV[:, 0]


def _round(x_GV: Tensor, bits_GV: Tensor, mantissa: int, scale_G: Tensor, blocks_GB: Tensor) -> None:
    """Write the codes of x / 2^(scale - 127), by integer arithmetic on the bits of floats.

    An E2M1 code is the leading bits of a float: exponent, and one bit of mantissa. With the exponent of 0.5 taken as
    zero, rounding to that one bit gives the code of everything from 1 up. Below, codes stand for 0, 0.5 and 1.
    """
    # 0.5 gets 0, 1 gets 1 << mantissa, and so on. Of groups with a scale below 3 only those of zeros stay.
    bits_GV = bits_GV - ((scale_G.clamp(min=3) - 1) << mantissa)[:, None]
    dropped = mantissa - 1
    codes_GV = (bits_GV >> dropped) & 1
    codes_GV += bits_GV
    codes_GV += (1 << (dropped - 1)) - 1
    codes_GV >>= dropped
    # From 0.75 on, which is half-way between 0.5 (odd) and 1 (even), the code is 2; above 0.25 it is 1.
    codes_GV.clamp_(max=7)
    small_GV = (bits_GV >= 1 << (mantissa - 1)).to(codes_GV.dtype) + (bits_GV > -(1 << mantissa)).to(codes_GV.dtype)
    torch.where(bits_GV < 1 << mantissa, small_GV, codes_GV, out=codes_GV)
    codes_GV = codes_GV.to(torch.uint8)
    codes_GV |= torch.signbit(x_GV).to(torch.uint8) << 3
    torch.bitwise_or(codes_GV[:, 0::2], codes_GV[:, 1::2] << 4, out=blocks_GB)


def _repair_tiny(x_GV: Tensor, largest_G: Tensor, mantissa: int, blocks_GB: Tensor, scales_G: Tensor) -> None:
    """Repack groups in which subnormal numbers count, whose bits mean something else, by comparing with every code."""
    tiny_G = (largest_G > 0) & (largest_G < 6 << mantissa)
    if not tiny_G.any():
        return
    x_GV, scale_G = x_GV[tiny_G].double(), scales_G[tiny_G].double()
    codes_GV = nearest_codes(x_GV / torch.exp2(scale_G - 127)[:, None])
    blocks_GB[tiny_G] = codes_GV[:, 0::2] | codes_GV[:, 1::2] << 4


def nearest_codes(x: Tensor) -> Tensor:
    """Return the code of the nearest value, and of two equally near ones the even; uint8 of x's shape.

    This is the slow reference.
    """
    values = torch.tensor(VALUES, dtype=torch.float64)
    distance = (x.double().abs()[..., None] - values).abs()
    even_first = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    codes = even_first[distance[..., even_first].argmin(-1)]
    return (codes | (torch.signbit(x).long() << 3)).to(torch.uint8)
