"""RMS normalisation in float32. Shapes: N rows (any leading dimensions), D features."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 and rounded once to x's dtype (arXiv:1910.07467)."""
    x32_ND = x_ND.float()
    scale_N1 = torch.rsqrt(x32_ND.square().mean(-1, keepdim=True) + eps)
    return (weight_D.float() * (x32_ND * scale_N1)).to(x_ND.dtype)
