"""Router losses from `RouterStats` sums. Shapes: L layers, E experts."""

from __future__ import annotations

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
