"""Attention with sinks of one new token per sequence, as in every step of decoding.

On a CPU the flash kernel of torch reads keys and values once, where they lie in the cache, and has no matrix product in
bf16, which many a CPU emulates. Sinks come in by its log-sum-exp (see `sink_attention.py`):

    o' = o * exp(lse - logaddexp(lse, sink)) = o * sigmoid(lse - sink)

`masked_sink_attention` is the slow twin, and serves on other devices.

Shapes: B batch, S keys, H query heads, K key/value heads, G = H / K, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_dist.ops.attention.sink_attention import masked_sink_attention


def one_token_attention(
    q_BH1D: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, sinks_H: Tensor, visible: Tensor | None, *, scale: float
) -> Tensor:
    """Return what one token of each sequence gathers, [B, H, 1, D] in q's dtype; without a gradient on the CPU.

    Args:
        q_BH1D: Queries.
        k_BKSD: Keys, in any layout in which the last dimension is contiguous.
        v_BKSD: Values, likewise.
        sinks_H: One logit per query head.
        visible: bool [1, S] or [B, 1, S], true where the query sees the key; None if it sees all. One key at least.
        scale: Factor on q . k.
    """
    if q_BH1D.device.type != "cpu" or torch.is_grad_enabled():
        return masked_sink_attention(q_BH1D, k_BKSD, v_BKSD, sinks_H, visible, scale=scale)
    (B, H, _, D), K = q_BH1D.shape, k_BKSD.shape[1]
    exact = torch.promote_types(q_BH1D.dtype, torch.float32)
    bias = None
    if visible is not None:  # the kernel repeats size 1 over heads, and wants a mask for each query of a group
        bias = torch.zeros(visible.shape, dtype=exact).masked_fill_(~visible, float("-inf"))
        bias = bias.view(-1, 1, 1, bias.shape[-1]).expand(B, 1, H // K, -1)
    o_BKGD, lse_BKG = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BH1D.reshape(B, K, H // K, D), k_BKSD, v_BKSD, 0.0, False, attn_mask=bias, scale=scale
    )
    o_BKGD = o_BKGD * torch.sigmoid(lse_BKG - sinks_H.to(exact).view(K, H // K))[..., None]
    return o_BKGD.to(q_BH1D.dtype).view(B, H, 1, D)
