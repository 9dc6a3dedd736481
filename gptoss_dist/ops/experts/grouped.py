"""The expert MLPs by two grouped matrix products: torch's own (`grouped_mm`) or those of the package `grouped_gemm`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gptoss_dist.ops.experts.activation import Gating, gated
from gptoss_dist.ops.experts.loop import check_counts


def grouped_mm_limit(dtype: torch.dtype, I: int, D: int) -> str | None:  # noqa: E741
    """Why ``grouped_mm`` cannot serve operands of this type and these sizes, or None."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"grouped_mm computes in bfloat16, float16 or float32, not {dtype}"
    multiple = 16 // dtype.itemsize
    if D % multiple or I % multiple:
        return (
            f"grouped_mm needs rows of whole 16 bytes: sizes in multiples of {multiple}, "
            f"not hidden {D} and intermediate {I}"
        )
    return None


def grouped_mm_experts(tokens_per_expert_E: Tensor, gating: Gating, operands: tuple) -> Tensor:
    if limit := grouped_mm_limit(operands[0].dtype, *operands[3].shape[1:]):
        raise ValueError(f"{limit}; use backend='loop' or 'blocked'")

    def multiply(rows, weight, offsets_E):
        out = F.grouped_mm(rows, weight, offs=offsets_E)
        if out.requires_grad:
            out.register_hook(torch.Tensor.contiguous)  # its backward refuses the stride-0 gradient of a sum or mean
        return out

    return _in_two_multiplications(multiply, tokens_per_expert_E, gating, *operands)


grouped_mm_experts_uncompiled = torch.compiler.disable(grouped_mm_experts)


@torch.compiler.disable  # as `_one_by_one`
def grouped_gemm_experts(tokens_per_expert_E: Tensor, gating: Gating, operands: tuple) -> Tensor:
    if operands[0].dtype != torch.bfloat16:
        raise ValueError(
            f"backend='grouped_gemm' computes in bfloat16 only, not {operands[0].dtype}; use backend='grouped_mm'"
        )
    try:
        from grouped_gemm import ops
    except ImportError as error:
        raise ValueError(
            f"backend='grouped_gemm' needs the package grouped_gemm, which cannot be imported ({error}); use "
            "backend='grouped_mm', or, with a CUDA toolkit, pip install --no-build-isolation grouped_gemm==0.3.0"
        ) from error
    counts_E = tokens_per_expert_E.to("cpu", torch.int64)  # the one wait for the device; the package wants them there
    check_counts(counts_E.tolist(), operands[0])  # it would read and write out of bounds

    def multiply(rows, weight, offsets_E):
        return ops.gmm(rows, weight.contiguous(), counts_E)

    return _in_two_multiplications(multiply, tokens_per_expert_E, gating, *operands)


def _in_two_multiplications(
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor],
    tokens_per_expert_E: Tensor,
    gating: Gating,
    x_ND,
    w1_EDF,
    b1_EF,
    w2_EID,
    b2_ED,
) -> Tensor:
    """``multiply(rows, weight, offsets_E)``: contiguous rows times the matrix of their expert; expert e's rows end
    before ``offsets_E[e]``."""
    tokens_E = tokens_per_expert_E.to(x_ND.device, torch.int32)
    offsets_E = tokens_E.cumsum(0, dtype=torch.int32)
    if b1_EF is None and b2_ED is None:
        expert_NE = None
    else:
        # One-hot rows turn the bias add, and its gradient, into one small GEMM each: no gather, no atomics.
        row_N1 = torch.arange(x_ND.shape[0], device=x_ND.device)[:, None]
        expert_NE = ((row_N1 < offsets_E) & (row_N1 >= offsets_E - tokens_E)).to(x_ND.dtype)

    def linear(rows, weight, bias):
        out = multiply(rows.contiguous(), weight, offsets_E)
        return out if bias is None else torch.addmm(out, expert_NE, bias)

    a_NI = gated(linear(x_ND, w1_EDF, b1_EF), gating)
    return linear(a_NI, w2_EID, b2_ED)
