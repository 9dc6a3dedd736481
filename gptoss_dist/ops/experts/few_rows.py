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

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor

from gptoss_dist.ops.experts.activation import gating_of

MOST_PAIRS = 64
"""Pairs of a token and an expert up to which this is the faster way (docs/log.md)."""


def serves(x_TD: Tensor, indices_TK: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Return whether to compute these tokens here: on a CPU, a few, without a gradient and not under torch.compile."""
    return (
        not torch.is_grad_enabled()
        and x_TD.device.type == "cpu"
        and 0 < indices_TK.numel() <= MOST_PAIRS
        and not torch.compiler.is_compiling()
        and all(p.dtype == x_TD.dtype for p in parameters)
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
    (T, K), gating = indices_TK.shape, gating_of(activation, alpha, limit)
    pairs = sorted((expert, pair) for pair, expert in enumerate(indices_TK.flatten().tolist()))
    order_N = torch.tensor([pair for _, pair in pairs])
    sorted_N = torch.tensor([expert for expert, _ in pairs])
    counts = [(expert, len(list(rows))) for expert, rows in groupby(expert for expert, _ in pairs)]
    x_ND = x_TD.expand(K, -1) if T == 1 else x_TD[order_N // K]
    h_NF = _multiply(counts, x_ND, gate_up_proj_EDF)
    if gate_up_proj_bias_EF is not None:
        h_NF += gate_up_proj_bias_EF[sorted_N]
    h_NF = h_NF if h_NF.dtype == torch.float64 else h_NF.float()
    gate_NI, up_NI = h_NF[:, ::2].clamp(max=gating.limit), h_NF[:, 1::2].clamp(-gating.limit, gating.limit)
    glu_NI = (gate_NI * gating.alpha).sigmoid_().mul_(gate_NI)
    a_NI = torch.addcmul(glu_NI, glu_NI, up_NI) if gating.plus_one else glu_NI.mul_(up_NI)
    y_ND = _multiply(counts, a_NI.to(x_TD.dtype), down_proj_EID)
    if down_proj_bias_ED is not None:
        y_ND += down_proj_bias_ED[sorted_N]
    y_TKD = torch.empty_like(y_ND).index_copy_(0, order_N, y_ND).view(T, K, -1)
    return (weights_TK[:, None] @ y_TKD)[:, 0]


def _multiply(counts: list[tuple[int, int]], x_ND: Tensor, weight_EDO: Tensor) -> Tensor:
    """Multiply the rows of each expert, given as (expert, its rows) in order, by its matrix."""
    out_NO = x_ND.new_empty(x_ND.shape[0], weight_EDO.shape[2])
    start = 0
    for expert, rows in counts:
        stop = start + rows
        torch.mm(x_ND[start:stop], weight_EDO[expert], out=out_NO[start:stop])
        start = stop
    return out_NO
