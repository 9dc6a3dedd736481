"""Losses of the router, from sums over tokens, and balancing without a loss.

Shapes: L layers, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_dist.model.moe import RouterStats


def balance_loss(stats: RouterStats, counts_LE: Tensor, tokens: int | Tensor, experts_per_token: int) -> Tensor:
    """Return the load-balancing loss E * sum_e f_e * P_e, mean over layers (arXiv:2101.03961, eq. 4 to 6).

    f_e is the share of token-expert pairs sent to expert e and P_e the mean router probability, so that perfect
    balance gives 1. The loss is linear in the local probabilities: with `counts_LE` and `tokens` taken over all ranks,
    the sum of the ranks' values is the value of the whole batch.

    Args:
        stats: Sums over the local tokens, with a leading layer dimension.
        counts_LE: Tokens routed to each expert, over whatever batch is to be balanced.
        tokens: Number of tokens in that batch.
        experts_per_token: Experts that each token is sent to.

    Returns:
        A float32 scalar, with a gradient to the router.
    """
    E = counts_LE.shape[-1]
    fraction_LE = counts_LE / (tokens * experts_per_token)
    return E * (fraction_LE * stats.probability_E / tokens).sum(-1).mean()


def z_loss(stats: RouterStats, tokens: int | Tensor) -> Tensor:
    """Return the mean squared log-partition of the router logits (ST-MoE, arXiv:2202.08906, eq. 5).

    Args:
        stats: Sums over the local tokens, with a leading layer dimension.
        tokens: Number of tokens to take the mean over.
    """
    return (stats.z / tokens).mean()


@torch.no_grad()
def updated_selection_bias(bias_E: Tensor, counts_E: Tensor, rate: float | Tensor) -> Tensor:
    """Return the next selection bias: up by `rate` where an expert got fewer tokens than the mean, down where more.

    b_e + rate * sign(mean(counts) - counts_e), over the last dimension (Wang et al. 2024, arXiv:2408.15664, algorithm
    1; DeepSeek-V3, arXiv:2412.19437, section 2.1.2). Both papers add the bias to sigmoid scores between 0 and 1, and
    use a rate of 0.001; here it is added to the router's logits, so the rate is in units of a logit.

    Args:
        bias_E: The present bias, [E] or [L, E].
        counts_E: Tokens routed to each expert over the whole batch (all ranks and micro-batches), of the same shape.
        rate: How far the bias moves; a tensor may hold 0 to skip the update without waiting for the device.

    Returns:
        A new float32 tensor of the same shape.
    """
    counts_E = counts_E.float()
    return bias_E.float() + rate * torch.sign(counts_E.mean(dim=-1, keepdim=True) - counts_E)
