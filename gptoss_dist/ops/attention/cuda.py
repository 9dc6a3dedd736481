"""Sink attention on CUDA: the stock windowed varlen flash kernels, rescaled by the sinks (see `sink_attention.py`).

`block_forward` and `block_backward` are without sinks, for queries behind all keys (see `blocks.py`).

The calls mirror those of `torch.nn.attention.varlen`, whose autograd cannot be used: the backward kernel must be given
the output and log-sum-exp that count the sinks in.

Shapes: B batch, T tokens, S keys of a block, H query heads, K key/value heads, D head_dim, N tokens in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
"""FlashAttention-2's limit (github.com/Dao-AILab/flash-attention, README); it also needs a multiple of 8, and sm80."""


def why_not(dtype: torch.dtype, sizes: tuple[int, ...], device: torch.device) -> str | None:
    """Say why the flash kernels cannot serve queries of this dtype and (head_dim,) on this CUDA device."""
    (D,) = sizes
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bf16 or fp16 on CUDA, not {dtype}"
    if D % 8 or D > MAX_HEAD_DIM:
        return f"needs a head_dim in multiples of 8 up to {MAX_HEAD_DIM} on CUDA, not {D}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        return "needs a GPU of compute capability 8.0 or later"
    return None


def forward(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    sinks_H: Tensor,
    scale: float,
    window: int | None,
    cu_seqlens: Tensor | None,
    longest: int,
) -> tuple[Tensor, Tensor]:
    """Return o_BTHD and lse_HN (float32), both with the sinks counted in; arguments as in `kernel_op.py`."""
    cu_seqlens = _one_document_each(q_BTHD) if cu_seqlens is None else cu_seqlens
    q_NHD, k_NKD, v_NKD = (x.flatten(0, 1) for x in (q_BTHD, k_BTKD, v_BTKD))
    o_NHD, lse_HN, *_ = torch.ops.aten._flash_attention_forward(
        q_NHD,
        k_NKD,
        v_NKD,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        0.0,
        window is None,
        False,
        scale=scale,
        **_window_arguments(window),
    )
    lse_with_sink_HN = torch.logaddexp(lse_HN, sinks_H.float()[:, None])
    # In place: the product is formed in float32 and rounded once, without a float32 copy of o.
    o_NHD.mul_(torch.exp(lse_HN - lse_with_sink_HN).t()[..., None])
    return o_NHD.contiguous().view(q_BTHD.shape), lse_with_sink_HN


def forward_unmasked(q_BTHD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return attention of every query to every key, without sinks: o_BTHD, and lse_BTH in float32.

    There must be two queries at least: for one the kernel may give the log-sum-exp in another order.
    """
    T, S = q_BTHD.shape[1], k_BKSD.shape[2]
    o_BTHD, lse_BHT, *_ = torch.ops.aten._flash_attention_forward(
        q_BTHD, k_BKSD.transpose(1, 2), v_BKSD.transpose(1, 2), None, None, T, S, 0.0, False, False, scale=scale
    )
    return o_BTHD, lse_BHT.transpose(1, 2)


def backward(
    do_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    o_BTHD: Tensor,
    lse_HN: Tensor,
    scale: float,
    window: int | None,
    cu_seqlens: Tensor | None,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq_BTHD, dk_BTKD, dv_BTKD, given what `forward` returned as o and lse."""
    cu_seqlens = _one_document_each(q_BTHD) if cu_seqlens is None else cu_seqlens
    dq_NHD, dk_NKD, dv_NKD = torch.ops.aten._flash_attention_backward(
        *(x.flatten(0, 1) for x in (do_BTHD, q_BTHD, k_BTKD, v_BTKD, o_BTHD)),
        lse_HN.contiguous(),  # which the kernel takes for granted
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        0.0,
        window is None,
        *_random_state(q_BTHD.device),
        scale=scale,
        **_window_arguments(window),
    )
    return (
        dq_NHD.contiguous().view(q_BTHD.shape),
        dk_NKD.contiguous().view(k_BTKD.shape),
        dv_NKD.contiguous().view(v_BTKD.shape),
    )


def block_forward(
    q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, first_BT: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return o_BTHD and lse_HBT, both in float32; arguments as in `blocks.py`."""
    B, T, H, _ = q_BTHD.shape
    S = k_BSKD.shape[1]
    o_NHD, lse_HN, *_ = torch.ops.aten._flash_attention_forward(
        *(x.flatten(0, 1) for x in (q_BTHD, k_BSKD, v_BSKD)),
        *_segments(q_BTHD, S, first_BT),
        max(T, 2),  # a bound: at 1 the kernel takes its decoding layout, with the log-sum-exp in another order
        S,
        0.0,
        False,
        False,
        scale=scale,
    )
    o_BTHD, lse_HBT = o_NHD.float().contiguous().view(q_BTHD.shape), lse_HN.view(H, B, T)
    if first_BT is not None:  # the kernel calls the log-sum-exp of nothing +inf
        seeing_BT = first_BT < S
        o_BTHD = torch.where(seeing_BT[..., None, None], o_BTHD, 0.0)
        lse_HBT = torch.where(seeing_BT, lse_HBT, float("-inf"))
    return o_BTHD, lse_HBT.contiguous()


def block_backward(
    do_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    o_BTHD: Tensor,
    lse_HBT: Tensor,
    first_BT: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq_BTHD, dk_BSKD and dv_BSKD in float32; arguments as in `blocks.py`."""
    T, S = q_BTHD.shape[1], k_BSKD.shape[1]
    dq_NHD, dk_NKD, dv_NKD = torch.ops.aten._flash_attention_backward(
        *(x.flatten(0, 1) for x in (do_BTHD, q_BTHD, k_BSKD, v_BSKD, o_BTHD)),
        lse_HBT.flatten(1),
        *_segments(q_BTHD, S, first_BT),
        T,
        S,
        0.0,
        False,
        *_random_state(q_BTHD.device),
        scale=scale,
    )
    dq_BTHD = dq_NHD.float().contiguous().view(q_BTHD.shape)
    dk_BSKD, dv_BSKD = (x.float().contiguous().view(k_BSKD.shape) for x in (dk_NKD, dv_NKD))
    if first_BT is not None:  # no matter what the kernel writes where there is nothing to do
        seeing_BT = first_BT < S
        dq_BTHD = torch.where(seeing_BT[..., None, None], dq_BTHD, 0.0)
        seen_BS = torch.arange(S, device=q_BTHD.device) >= first_BT[:, :1]
        dk_BSKD, dv_BSKD = (torch.where(seen_BS[..., None, None], x, 0.0) for x in (dk_BSKD, dv_BSKD))
    return dq_BTHD, dk_BSKD, dv_BSKD


def _random_state(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what the backward kernel takes as random state, and does not read without dropout."""
    return torch.zeros(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)


def _segments(q_BTHD: Tensor, S: int, first_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return cu_seqlens of queries and of keys.

    With documents every sequence has three segments: hidden keys without queries, the rectangle, and queries that see
    nothing. Their number is always the same, so that the host need not know their sizes.
    """
    B, T = q_BTHD.shape[:2]

    def ends(n: int) -> Tensor:
        return torch.arange(0, (B + 1) * n, n, dtype=torch.int32, device=q_BTHD.device)

    def summed(*lengths_B: Tensor) -> Tensor:
        return torch.nn.functional.pad(torch.stack(lengths_B, 1).flatten().cumsum(0), (1, 0)).int()

    if first_BT is None:
        return ends(T), ends(S)
    seeing_B, first_B = (first_BT < S).sum(1), first_BT[:, 0].clamp(max=S)
    none_B = torch.zeros_like(first_B)
    return summed(none_B, seeing_B, T - seeing_B), summed(first_B, S - first_B, none_B)


def _window_arguments(window: int | None) -> dict[str, int]:
    """Return the window as the kernel counts it: keys to the left of the query, without itself.

    An explicit 0 on the right, even where causal, keeps the kernel from its decoding layout at T = 1, in which the
    log-sum-exp comes in another order.
    """
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}


def _one_document_each(x_BTHD: Tensor) -> Tensor:
    B, T = x_BTHD.shape[:2]
    return torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=x_BTHD.device)
