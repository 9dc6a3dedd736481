"""The choice of a next token from logits, in the order: repetition penalty, temperature, top-k, top-p, min-p, one draw.

A row needs one uniform number for its draw: the token is where the cumulated probability passes it. So a row's choice
depends on its own logits and its own number only, whatever else is in the batch.

Shapes: B rows, V vocab_size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def penalize_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less likely: their logits are divided by a penalty (CTRL, arXiv:1909.05858, 4.1).

    As everywhere by now, a negative logit is multiplied instead: divided, it would become more likely.

    Args:
        logits_BV: Logits.
        seen_BV: Whether a token is in the row's text, bool.
        penalty: Above 1 for less repetition; 1 changes nothing.
    """
    return torch.where(seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def sample(
    logits_BV: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    min_p: float = 0.0,
    uniform_B: Tensor | None = None,
) -> Tensor:
    """Draw one id per row, [B] int64.

    Args:
        logits_BV: float32.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: How many of the likeliest tokens to draw from; 0 is all.
        top_p: Draw from the smallest set of tokens with this much probability (nucleus, arXiv:1904.09751).
        generator: The source of randomness, on the CPU, if `uniform_B` is not given.
        min_p: Draw from tokens with at least this share of the likeliest one's probability (arXiv:2407.01082).
        uniform_B: A number in [0, 1) per row, float64.

    Returns:
        The ids; -1 for a row with a nan, or whose largest logit is infinite.
    """
    if temperature < torch.finfo(torch.float32).tiny:  # 0 for float32
        chosen_B = logits_BV.argmax(dim=-1)  # a nan counts as the largest
        return torch.where(logits_BV.gather(1, chosen_B[:, None])[:, 0].isfinite(), chosen_B, -1)
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature  # however small, nothing is NaN
    order_BV = None
    if 0 < top_k < logits_BV.shape[-1]:
        logits_BV, order_BV = logits_BV.topk(top_k, dim=-1)
    elif top_p < 1:
        logits_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    p_BV = logits_BV.softmax(dim=-1, dtype=torch.float64)
    if top_p < 1:
        # Drop a token if those before it already reach top_p; the first always stays.
        p_BV = p_BV.masked_fill(p_BV.cumsum(dim=-1) - p_BV >= top_p, 0.0)
    if min_p > 0:
        p_BV = p_BV.masked_fill(p_BV < min_p * p_BV.amax(dim=-1, keepdim=True), 0.0)
    if uniform_B is None:
        uniform_B = torch.rand(len(p_BV), dtype=torch.float64, generator=generator)
    cumulated_BV = p_BV.cumsum(dim=-1)
    threshold_B1 = uniform_B.to(p_BV.device)[:, None] * cumulated_BV[:, -1:]
    chosen_B1 = torch.searchsorted(cumulated_BV, threshold_B1, right=True)
    # Rounding may leave the threshold at the sum itself: then the last token that has any probability is meant.
    chosen_B1 = torch.minimum(chosen_B1, torch.searchsorted(cumulated_BV, cumulated_BV[:, -1:].contiguous()))
    if order_BV is not None:
        chosen_B1 = order_BV.gather(1, chosen_B1.clamp(max=p_BV.shape[1] - 1))
    return torch.where(cumulated_BV[:, -1].isnan(), -1, chosen_B1[:, 0])
