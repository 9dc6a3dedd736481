"""RMS normalisation in float32 (arXiv:1910.07467).

Shapes: N rows (any leading dimensions), D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptoss_dist.ops.backends import Backend, choose, serves_all, table

_FEW = 1 << 15
"""Elements of a decoding step, where all is overhead: without a gradient, one call of torch's replaces eight."""


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight, computed in float32 and rounded once to x's dtype.

    Args:
        x_ND: Rows, of any floating dtype; float64 is computed in float64.
        weight_D: Factors, of any floating dtype.
        eps: What is added to the mean square.
        backend: `reference` is plain autograd; `fused` (which `auto` takes) makes a third of its passes over memory,
            with the gradient written out, and keeps only x and one number per row for it.

    Raises:
        ValueError: The back end is unknown.
    """
    return choose(BACKENDS, backend, ("fused",), x_ND.dtype, (), x_ND.device).run(x_ND, weight_D, eps)


def _reference(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x32_ND = _upcast(x_ND)
    scale_N1 = torch.rsqrt(x32_ND.square().mean(-1, keepdim=True) + eps)
    return (_upcast(weight_D) * (x32_ND * scale_N1)).to(x_ND.dtype)


def _fused(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    few = x_ND.numel() <= _FEW and x_ND.dtype == weight_D.dtype
    if few and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return F.rms_norm(x_ND, weight_D.shape, weight_D, eps)
    return _RmsNorm.apply(x_ND, weight_D, eps)


BACKENDS = table(Backend("fused", serves_all, _fused), Backend("reference", serves_all, _reference))
"""`run` takes x_ND, weight_D and eps."""


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x32_ND = _upcast(x_ND)
        scale_N1 = torch.linalg.vecdot(x32_ND, x32_ND).div_(x_ND.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x_ND, weight_D, scale_N1)
        return (x32_ND * scale_N1).mul_(_upcast(weight_D)).to(x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_ND: Tensor):
        x_ND, weight_D, scale_N1 = ctx.saved_tensors
        normal_ND, dy32_ND = _upcast(x_ND) * scale_N1, _upcast(dy_ND)
        dweight_D = (dy32_ND * normal_ND).flatten(0, -2).sum(0).to(weight_D.dtype)
        dnormal_ND = dy32_ND * _upcast(weight_D)
        # The gradient of x / rms is what remains of dnormal orthogonal to x, scaled.
        along_N1 = torch.linalg.vecdot(dnormal_ND, normal_ND).div_(x_ND.shape[-1]).unsqueeze(-1)
        dx_ND = dnormal_ND.sub_(normal_ND.mul_(along_N1)).mul_(scale_N1)
        return dx_ND.to(x_ND.dtype), dweight_D, None
