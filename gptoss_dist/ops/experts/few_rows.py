"""The experts of a decoding step on the CPU: so few rows that what surrounds the matrix products would take longer.

    experts [[3, 1], [0, 3]]  of two tokens, two each
    pairs    0  1   2  3      in the order of tokens
    rows     2; 1; 0 and 3    of everything below, in the order of experts: a product for each of them

Each chosen expert multiplies its rows straight from the stacked weights; the biases, the activation, and the weighted
sum are one pass each over the rows of all experts. Nothing is padded or kept for a backward pass: there is none.
`Experts.forward` does the same in general and is the slow twin.

Shapes: T tokens, K experts per token, N = T * K pairs, E experts, D hidden size, I intermediate size, F = 2 * I, of
one matrix product C inputs and O outputs.
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
    (T, K), expert_N = indices_TK.shape, indices_TK.flatten()
    # Which experts are chosen is known to the host only at run time: to a compiler a product is one opaque operation.
    multiply = _multiply_operator if torch.compiler.is_compiling() else _multiply
    if T == 1:  # its experts are all different, in whatever order
        x_ND, order_N = x_TD.expand(K, -1), None
    else:
        order_N = expert_N.argsort(stable=True)
        x_ND, expert_N = x_TD.index_select(0, order_N // K), expert_N.index_select(0, order_N)
    h_NF = multiply(x_ND, expert_N, gate_up_proj_EDF)
    if gate_up_proj_bias_EF is not None:
        h_NF += gate_up_proj_bias_EF.index_select(0, expert_N)
    a_NI = _activate(h_NF if h_NF.dtype == torch.float64 else h_NF.float(), gating_of(activation, alpha, limit))
    y_ND = multiply(a_NI.to(x_TD.dtype), expert_N, down_proj_EID)
    if down_proj_bias_ED is not None:
        y_ND += down_proj_bias_ED.index_select(0, expert_N)
    if order_N is not None:
        y_ND = torch.empty_like(y_ND).index_copy_(0, order_N, y_ND)
    return torch.bmm(weights_TK[:, None].to(y_ND.dtype), y_ND.view(T, K, -1))[:, 0]


def _activate(h_NF: Tensor, gating: Gating) -> Tensor:
    """Return `swiglu_reference` of h in half as many passes."""
    gate_NI, up_NI = h_NF[:, ::2], h_NF[:, 1::2]
    if gating.limit < math.inf:
        gate_NI, up_NI = gate_NI.clamp_max(gating.limit), up_NI.clamp(-gating.limit, gating.limit)
    glu_NI = torch.sigmoid(gate_NI * gating.alpha).mul_(gate_NI)
    return torch.addcmul(glu_NI, glu_NI, up_NI) if gating.plus_one else glu_NI.mul_(up_NI)


def _multiply(x_NC: Tensor, expert_N: Tensor, weight_ECO: Tensor) -> Tensor:
    """Multiply each row by the matrix of its expert, [N, O]; rows of one expert lie together.

    Where bf16 products are emulated, one row is a product of matrix and vector, which torch computes well from this
    layout (and several rows badly).
    """
    out_NO, start = x_NC.new_empty(x_NC.shape[0], weight_ECO.shape[2]), 0
    for expert, rows in groupby(expert_N.tolist()):
        stop = start + len(list(rows))
        _multiply_rows(x_NC[start:stop], weight_ECO[expert], out_NO[start:stop])
        start = stop
    return out_NO


_multiply_operator = torch.library.custom_op("gptoss_dist::multiply_by_expert", _multiply, mutates_args=())
_multiply_operator.register_fake(lambda x_NC, _, weight_ECO: x_NC.new_empty(x_NC.shape[0], weight_ECO.shape[2]))


def _multiply_rows(x_nC: Tensor, weight_CO: Tensor, out_nO: Tensor) -> None:
    if gemm_dtype(x_nC, MIN_ROWS) == x_nC.dtype:
        torch.mm(x_nC, weight_CO, out=out_nO)
    elif x_nC.shape[0] == 1:
        torch.mv(weight_CO.t(), x_nC[0], out=out_nO[0])
    else:
        out_nO.copy_(mm_in_float32(x_nC, weight_CO))
