"""The expert MLPs by two grouped matrix products: torch's own (`grouped_mm`) or those of the package `grouped_gemm`.

Shapes: N rows of all experts, E experts, D hidden size, I intermediate size, F = 2 * I.
"""

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gptoss_dist.ops.backends import BF16_ONLY
from gptoss_dist.ops.experts.activation import Gating, gated
from gptoss_dist.ops.experts.loop import check_counts


def why_not_grouped_mm(dtype: torch.dtype, sizes: tuple[int, ...], device: torch.device) -> str | None:
    """Say why `grouped_mm` cannot serve operands of this type with (hidden, intermediate) sizes like these."""
    D, I = sizes  # noqa: E741
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"computes in bfloat16, float16 or float32, not {dtype}"
    multiple = 16 // dtype.itemsize
    if D % multiple or I % multiple:
        return f"needs rows of whole 16 bytes: sizes in multiples of {multiple}, not hidden {D} and intermediate {I}"
    return None


def grouped_mm_experts(tokens_per_expert_E: Tensor, gating: Gating, operands: tuple) -> Tensor:
    """Compute the expert MLPs by torch's grouped products; arguments as in the table of `grouped_experts.py`."""
    # The compiler's idea of torch's grouped product knows bf16 only: for other types the graph breaks here.
    multiply = _by_grouped_mm if operands[0].dtype == torch.bfloat16 else _by_grouped_mm_uncompiled
    return multiply(tokens_per_expert_E, gating, operands)


def _by_grouped_mm(tokens_per_expert_E: Tensor, gating: Gating, operands: tuple) -> Tensor:
    def multiply(rows, weight, offsets_E):
        out = F.grouped_mm(rows, weight, offs=offsets_E)
        if out.requires_grad:
            out.register_hook(torch.Tensor.contiguous)  # its backward refuses the stride-0 gradient of a sum or mean
        return out

    return _in_two_multiplications(multiply, tokens_per_expert_E, gating, *operands)


_by_grouped_mm_uncompiled = torch.compiler.disable(_by_grouped_mm)


def why_not_grouped_gemm(dtype: torch.dtype, sizes: tuple[int, ...], device: torch.device) -> str | None:
    """Say why the package `grouped_gemm` cannot serve operands like these, here."""
    if dtype != torch.bfloat16:
        return BF16_ONLY
    if device.type != "cuda":
        return "computes on CUDA only"
    if error := _import_error():
        return (
            f"needs the package of that name, which cannot be imported ({error}); with a CUDA toolkit, "
            "pip install --no-build-isolation grouped_gemm==0.3.0"
        )
    return None


@torch.compiler.disable
def _import_error() -> ImportError | None:
    try:
        importlib.import_module("grouped_gemm")
    except ImportError as error:
        return error
    return None


@torch.compiler.disable  # row counts on the host are what a compiler cannot trace
def grouped_gemm_experts(tokens_per_expert_E: Tensor, gating: Gating, operands: tuple) -> Tensor:
    """Compute the expert MLPs by the package `grouped_gemm`; arguments as in the table of `grouped_experts.py`."""
    from grouped_gemm import ops

    # The one wait for the device: the package wants row counts on the host, and would read and write out of bounds.
    counts_E = tokens_per_expert_E.to("cpu", torch.int64)
    check_counts(counts_E.tolist(), operands[0])

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
    """Compute the expert MLPs by `multiply(rows, weight, offsets_E)`.

    It multiplies contiguous rows by the matrix of their expert; the rows of expert e end before offsets_E[e].
    """
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
