"""The slow reference of the expert MLPs: one expert at a time, under plain autograd.

Shapes: N rows of all experts, n rows of one expert, E experts, D hidden size, I intermediate size, F = 2 * I.
"""

import torch
from torch import Tensor

from gptoss_dist.ops.experts.activation import Gating, swiglu_reference


def check_counts(counts: list[int], x_ND: Tensor) -> None:
    """Check that every row of x has an expert.

    Raises:
        ValueError: The counts do not sum to the number of rows.
    """
    if sum(counts) != x_ND.shape[0]:
        raise ValueError(
            f"tokens_per_expert sums to {sum(counts)} but x has {x_ND.shape[0]} rows; every row needs an expert"
        )


@torch.compiler.disable  # row counts on the host are what a compiler cannot trace; it breaks the graph here instead
def loop_experts(tokens_per_expert_E: Tensor, gating: Gating, operands: tuple) -> Tensor:
    """Compute the expert MLPs one by one; arguments as in the table of `grouped_experts.py`."""
    x_ND, w1_EDF, b1_EF, w2_EID, b2_ED = operands
    counts = tokens_per_expert_E.tolist()
    check_counts(counts, x_ND)
    # unbind, not indexing: the backward of each w[e] would fill a whole [E, ...] gradient.
    none_E = (None,) * len(counts)
    biases = (none_E if b is None else b.unbind(0) for b in (b1_EF, b2_ED))
    y_parts = []
    for x_nD, w1_DF, w2_ID, b1_F, b2_D in zip(x_ND.split(counts), w1_EDF.unbind(0), w2_EID.unbind(0), *biases):
        h_nF = x_nD @ w1_DF if b1_F is None else x_nD @ w1_DF + b1_F
        a_nI = swiglu_reference(h_nF, gating)
        y_parts.append(a_nI @ w2_ID if b2_D is None else a_nI @ w2_ID + b2_D)
    return torch.cat(y_parts)
