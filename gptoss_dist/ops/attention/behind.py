"""Attention with sinks of a chunk of tokens that comes behind others, whose keys and values are there already.

No T x S mask is ever built, and memory is linear in both:

- without a window, every token of the chunk sees all earlier keys. Attention to these needs no mask; attention within
  the chunk is the plain causal one, which counts the sinks, once; and the two are merged by their log-sum-exps,

      lse = logaddexp(lse_earlier, lse_own),    o = o_earlier * exp(lse_earlier - lse) + o_own * exp(lse_own - lse);

- with a window, the chunk sees few earlier keys. Zeros stand in for their queries, and what these gather is dropped:
  that leaves plain windowed attention over earlier keys and chunk together.

`masked_sink_attention` is the definition, and serves where there are few scores, as in decoding.

Shapes: B batch, T tokens of the chunk, E earlier tokens, S = E + T keys, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptoss_dist.ops.attention import cuda, kernel_op, tiled
from gptoss_dist.ops.attention.documents import Documents
from gptoss_dist.ops.attention.sink_attention import AUTO_ORDER, BACKENDS, sink_attention
from gptoss_dist.ops.backends import choose


def visible_behind(T: int, S: int, window: int | None, firsts: Sequence[int] | None, device: torch.device) -> Tensor:
    """Return which of S keys each of the last T of them sees, bool [T, S], or [B, T, S] if rows begin with padding.

    Args:
        T: The chunk's tokens.
        S: All keys.
        window: How many keys a query sees, itself included; None for all earlier ones.
        firsts: Per row, the first key that is no padding.
        device: Where the result is to be.
    """
    key_S = torch.arange(S, device=device)
    distance_TS = torch.arange(S - T, S, device=device)[:, None] - key_S
    visible = (distance_TS >= 0) & (distance_TS < (S if window is None else window))
    if firsts is not None and max(firsts) > 0:
        visible = visible & (key_S >= torch.tensor(firsts, device=device)[:, None, None])
    return visible


def full_attention_behind(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    k_BKED: Tensor,
    v_BKED: Tensor,
    sinks_H: Tensor,
    *,
    scale: float,
    firsts: Sequence[int] | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return causal attention, without a window, of a chunk of at least two tokens; it has no gradient.

    Args:
        q_BHTD: The chunk's queries.
        k_BKTD: The chunk's keys.
        v_BKTD: The chunk's values.
        k_BKED: Earlier keys, E >= 1, in any layout in which the last dimension is contiguous.
        v_BKED: Earlier values.
        sinks_H: One logit per query head.
        scale: Factor on q . k.
        firsts: Per row, the first key that is no padding, counted from the first earlier one.
        documents: Text and padding within the chunk, if some row has padding there (`padded_documents`).
        backend: As in `sink_attention`; what is not `flash` is `chunked` here.

    Returns:
        o_BHTD in q's dtype.
    """
    name = choose(BACKENDS, backend, AUTO_ORDER, q_BHTD.dtype, q_BHTD.shape[3:], q_BHTD.device).name
    kernel = name if name == "flash" else "chunked"
    first_BT, cu_seqlens, longest = (None, None, q_BHTD.shape[2]) if documents is None else documents
    q_BTHD, own_k_BTKD, own_v_BTKD = (x.transpose(1, 2) for x in (q_BHTD, k_BKTD, v_BKTD))
    o_BTHD, lse_HN = kernel_op.forward(
        q_BTHD, own_k_BTKD, own_v_BTKD, sinks_H, scale, None, first_BT, cu_seqlens, longest, kernel
    )
    lse_BTH = lse_HN.view(-1, *q_BTHD.shape[:2]).permute(1, 2, 0)
    E = k_BKED.shape[2]
    if firsts is None or max(firsts) <= 0:
        rows = [(slice(None), 0)]
    else:  # whose text has begun before the chunk
        rows = [(slice(row, row + 1), max(first, 0)) for row, first in enumerate(firsts) if first < E]
    for row, first in rows:
        earlier = q_BTHD[row], k_BKED[row, :, first:], v_BKED[row, :, first:], scale
        if kernel == "flash" and q_BTHD.device.type != "cpu":
            part = cuda.forward_unmasked(*earlier)
        else:
            part = tiled.forward_unmasked(*earlier, kernel)
        merged, _ = tiled.merge(o_BTHD[row].to(lse_BTH.dtype), lse_BTH[row], part[0].to(lse_BTH.dtype), part[1])
        o_BTHD[row] = merged.to(o_BTHD.dtype)
    return o_BTHD.transpose(1, 2)


def windowed_attention_behind(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    sinks_H: Tensor,
    *,
    scale: float,
    window: int,
    documents: Documents | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return causal attention within a window of a chunk.

    Args:
        q_BHTD: The chunk's queries.
        k_BKSD: Earlier keys that some query sees, and the chunk's own behind them.
        v_BKSD: The values of both.
        sinks_H: One logit per query head.
        scale: Factor on q . k.
        window: How many keys a query sees, itself included.
        documents: Text and padding among all S keys, if some row has padding there (`padded_documents`).
        backend: As in `sink_attention`.

    Returns:
        o_BHTD in q's dtype.
    """
    B, H, T, D = q_BHTD.shape
    S = k_BKSD.shape[2]
    padded_BSHD = q_BHTD.new_zeros(B, S, H, D)
    padded_BSHD[:, S - T :] = q_BHTD.transpose(1, 2)
    o_BHSD = sink_attention(
        padded_BSHD.transpose(1, 2),
        k_BKSD,
        v_BKSD,
        sinks_H,
        scale=scale,
        window=window,
        documents=documents,
        backend=backend,
    )
    return o_BHSD[:, :, S - T :]
