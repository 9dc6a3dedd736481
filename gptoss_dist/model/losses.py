"""Router losses from `RouterStats` sums, and balancing without a loss. Shapes: L layers, E experts."""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_dist.model.moe import RouterStats


def balance_loss(stats: RouterStats, counts_LE: Tensor, tokens: int | Tensor, experts_per_token: int) -> Tensor:
    """Load-balancing loss, mean over layers: E * sum_e f_e * P_e (Switch Transformer, arXiv:2101.03961, eq. 4-6).

    f_e is the share of token-expert pairs sent to expert e and P_e the mean router probability, so that perfect
    balance gives 1. The loss is linear in the local probabilities: with `counts_LE` and `tokens` taken over all ranks,
    the sum of the ranks' values is the value of the whole batch.

    Args:
        stats: sums of the local tokens, with a leading layer dimension.
        counts_LE: tokens routed to each expert, over whatever batch is to be balanced.
        tokens: number of tokens in that batch.
        experts_per_token: top-k.
    """
    E = counts_LE.shape[-1]
    fraction_LE = counts_LE / (tokens * experts_per_token)
    return E * (fraction_LE * stats.probability_E / tokens).sum(-1).mean()


def z_loss(stats: RouterStats, tokens: int | Tensor) -> Tensor:
    """Mean squared log-partition of the router logits over tokens and layers (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return (stats.z / tokens).mean()


@torch.no_grad()
def updated_selection_bias(bias_E: Tensor, counts_E: Tensor, rate: float | Tensor) -> Tensor:
    """The selection bias for the next step: up by `rate` where an expert got less than the mean, down where more.

    b_e + rate * sign(mean(counts) - counts_e), over the last dimension (Wang et al. 2024, arXiv:2408.15664, algorithm
    1; DeepSeek-V3, arXiv:2412.19437, section 2.1.2). Both papers add the bias to sigmoid scores between 0 and 1, and
    use a rate of 0.001; here it is added to the router's logits, so the rate is in units of a logit.

    Args:
        bias_E: present bias, [E] or [L, E].
        counts_E: tokens routed to each expert over the whole batch (all ranks and micro-batches), same shape.
        rate: step of the bias; a tensor may hold 0 to skip the update without waiting for the device.

    Returns:
        A new float32 tensor of the same shape.
    """
    counts_E = counts_E.float()
    return bias_E.float() + rate * torch.sign(counts_E.mean(dim=-1, keepdim=True) - counts_E)
