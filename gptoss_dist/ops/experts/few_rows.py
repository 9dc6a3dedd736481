"""The experts of a decoding step on the CPU: so few rows that what surrounds the matrix products would take longer.

    experts [[3, 1], [0, 3]]  of two tokens, two each
    pairs    0  1   2  3      in the order of tokens
    sorted   2  1   0  3      by expert: 0, 1, 3, 3, on the host

Each chosen expert multiplies its rows straight from the stacked weights; the bias, the activation, and the weighted sum
are then one pass each over the rows of all experts. Nothing is padded, copied or kept for a backward pass: there is
none. `Experts.forward` does the same in general and is the slow twin.

Shapes: T tokens, K experts per token, N = T * K pairs, E experts, D hidden size, I intermediate size, F = 2 * I.
"""

from __future__ import annotations

import math
from itertools import groupby

import torch
from torch import Tensor

from gptoss_dist.ops.experts.activation import Gating, gating_of
from gptoss_dist.ops.gemm import MIN_ROWS, gemm_dtype, mm_in_float32

MOST_PAIRS = 64
"""Pairs of a token and an expert up to which this is the faster way (docs/log.md)."""


def serves(x_TD: Tensor, indices_TK: Tensor, weight: Tensor) -> bool:
    """Return whether to compute these tokens here: on a CPU, a few, and without a gradient."""
    return (
        not torch.is_grad_enabled()
        and x_TD.device.type == "cpu"
        and 0 < indices_TK.numel() <= MOST_PAIRS
        and weight.dtype == x_TD.dtype
    )


def experts_of_few_rows(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    gate_up_proj_EDF: Tensor,
    gate_up_proj_bias_EF: Tensor | None,
    down_proj_EID: Tensor,
    down_proj_bias_ED: Tensor | None,
    *,
    activation: str,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    """Return the sum over k of weight * expert(x), [T, D] in x's dtype; the other arguments are `grouped_experts`'s.

    Args:
        x_TD: Tokens.
        weights_TK: Router weights.
        indices_TK: Expert of each pair, int64.
    """
    gating = gating_of(activation, alpha, limit)
    # Which experts are chosen is known to the host only at run time: a compiler sees one opaque operation.
    run = _operator if torch.compiler.is_compiling() else _run
    operands = (gate_up_proj_EDF, gate_up_proj_bias_EF, down_proj_EID, down_proj_bias_ED)
    return run(x_TD, weights_TK, indices_TK, *operands, *gating)


def _run(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    gate_up_proj_EDF: Tensor,
    gate_up_proj_bias_EF: Tensor | None,
    down_proj_EID: Tensor,
    down_proj_bias_ED: Tensor | None,
    alpha: float,
    limit: float,
    plus_one: bool,
) -> Tensor:
    (T, K), gating = indices_TK.shape, Gating(alpha, limit, plus_one)
    pairs = sorted((expert, pair) for pair, expert in enumerate(indices_TK.flatten().tolist()))
    counts = [(expert, len(list(rows))) for expert, rows in groupby(expert for expert, _ in pairs)]
    sorted_N, order_N = torch.tensor(pairs).unbind(1)
    x_ND = x_TD.expand(K, -1) if T == 1 else x_TD.index_select(0, order_N // K)
    h_NF = _multiply(counts, x_ND, gate_up_proj_EDF)
    if gate_up_proj_bias_EF is not None:
        h_NF += gate_up_proj_bias_EF.index_select(0, sorted_N)
    a_NI = _activate(h_NF if h_NF.dtype == torch.float64 else h_NF.float(), gating)
    y_ND = _multiply(counts, a_NI.to(x_TD.dtype), down_proj_EID)
    if down_proj_bias_ED is not None:
        y_ND += down_proj_bias_ED.index_select(0, sorted_N)
    weights_TK = weights_TK.to(y_ND.dtype)
    if T == 1:
        return weights_TK.index_select(1, order_N) @ y_ND
    y_TKD = torch.empty_like(y_ND).index_copy_(0, order_N, y_ND).view(T, K, -1)
    return torch.bmm(weights_TK[:, None], y_TKD)[:, 0]


_operator = torch.library.custom_op("gptoss_dist::experts_of_few_rows", _run, mutates_args=())
_operator.register_fake(lambda x_TD, *_: x_TD.new_empty(x_TD.shape))


def _activate(h_NF: Tensor, gating: Gating) -> Tensor:
    """Return `swiglu_reference` of h in half as many passes."""
    gate_NI, up_NI = h_NF[:, ::2], h_NF[:, 1::2]
    if gating.limit < math.inf:
        gate_NI, up_NI = gate_NI.clamp_max(gating.limit), up_NI.clamp(-gating.limit, gating.limit)
    glu_NI = torch.sigmoid(gate_NI * gating.alpha).mul_(gate_NI)
    return torch.addcmul(glu_NI, glu_NI, up_NI) if gating.plus_one else glu_NI.mul_(up_NI)


def _multiply(counts: list[tuple[int, int]], x_ND: Tensor, weight_EDO: Tensor) -> Tensor:
    """Multiply the rows of each expert, given as (expert, its rows) in order, by its matrix.

    Where bf16 products are emulated, one row is a product of matrix and vector, which torch computes well from this
    layout (and several rows badly).
    """
    emulated = gemm_dtype(x_ND, MIN_ROWS) != x_ND.dtype
    out_NO = x_ND.new_empty(x_ND.shape[0], weight_EDO.shape[2])
    start = 0
    for expert, rows in counts:
        x_nD, out_nO, weight_DO = x_ND[start : start + rows], out_NO[start : start + rows], weight_EDO[expert]
        if not emulated:
            torch.mm(x_nD, weight_DO, out=out_nO)
        elif rows == 1:
            torch.mv(weight_DO.t(), x_nD[0], out=out_nO[0])
        else:
            out_nO.copy_(mm_in_float32(x_nD, weight_DO))
        start += rows
    return out_NO
