"""Attention of queries to keys that all lie before them: what is left of causal attention off its diagonal.

A sequence that is cut into chunks has attention within each chunk (`kernel_op.py`), and of each chunk to every earlier
one, here. Nothing is masked for being later, and there are no sinks: whoever adds up the blocks counts them once, by

    lse = logaddexp(lse_1, lse_2),    o = o_1 * exp(lse_1 - lse) + o_2 * exp(lse_2 - lse).

As with sinks, a flash backward kernel that is given the o and lse of all blocks together gives the exact gradients of
this one.

At most one document of a sequence reaches from a block of keys to later queries. So what is visible is a rectangle:

    keys      3 3 3 4 4 4 4        (the document of each token)
    queries         4 4 4 5 5      the first three see the last four keys, the others nothing

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head_dim; R = C * G rows of a strip
of C queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_dist.ops.attention import cuda
from gptoss_dist.ops.attention.sink_attention import AUTO_ORDER, BACKENDS
from gptoss_dist.ops.attention.tiled import ROWS_PER_STRIP, group_heads, ungroup_heads
from gptoss_dist.ops.backends import choose

aten = torch.ops.aten


def block_kernel(backend: str, q_BTHD: Tensor) -> str:
    """Return the kernel that computes blocks where a back end of `sink_attention` is asked for: `flash` or `chunked`.

    Args:
        backend: `auto`, or a name in `BACKENDS`.
        q_BTHD: Queries, for their dtype, head_dim and device.

    Raises:
        ValueError: The back end is unknown or cannot serve.
    """
    name = choose(BACKENDS, backend, AUTO_ORDER, q_BTHD.dtype, (q_BTHD.shape[-1],), q_BTHD.device).name
    return {"fused": "flash", "reference": "chunked"}.get(name, name)


def forward(
    q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, first_BT: Tensor | None, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """Return o_BTHD and lse_HBT, both in float32 (float64 for float64 inputs).

    A query that sees no key has zeros and -inf.

    Args:
        q_BTHD: Queries.
        k_BSKD: Keys before all of them, of the same dtype.
        v_BSKD: Values.
        first_BT: The first key that each query sees, S or more if it sees none, ascending along T: those that see any
            see the same ones. None if all see all.
        scale: Factor on q . k.
        kernel: From `block_kernel`.
    """
    if kernel == "chunked":
        return _chunked_forward(q_BTHD, k_BSKD, v_BSKD, first_BT, scale)
    if q_BTHD.device.type != "cpu":
        return cuda.block_forward(q_BTHD, k_BSKD, v_BSKD, first_BT, scale)
    return _cpu_forward(q_BTHD, k_BSKD, v_BSKD, first_BT, scale)


def backward(
    do_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    o_BTHD: Tensor,
    lse_HBT: Tensor,
    first_BT: Tensor | None,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq_BTHD, dk_BSKD and dv_BSKD in lse's dtype.

    Args:
        do_BTHD: Gradient of the output of all blocks together, in q's dtype.
        q_BTHD: Queries.
        k_BSKD: Keys of this block.
        v_BSKD: Values of this block.
        o_BTHD: The output of all blocks together, in q's dtype.
        lse_HBT: Its log-sum-exp; it is finite, as there are sinks.
        first_BT: As in `forward`.
        scale: As in `forward`.
        kernel: As in `forward`.
    """
    tensors = (do_BTHD, q_BTHD, k_BSKD, v_BSKD, o_BTHD, lse_HBT, first_BT, scale)
    if kernel == "chunked":
        return _chunked_backward(*tensors)
    return (_cpu_backward if q_BTHD.device.type == "cpu" else cuda.block_backward)(*tensors)


_forward = torch.library.custom_op("gptoss_dist::block_attention", forward, mutates_args=())


@_forward.register_fake
def _(q_BTHD, k_BSKD, v_BSKD, first_BT, scale, kernel):
    B, T, H, _ = q_BTHD.shape
    exact = torch.promote_types(q_BTHD.dtype, torch.float32)
    return q_BTHD.new_empty(q_BTHD.shape, dtype=exact), q_BTHD.new_empty((H, B, T), dtype=exact)


_backward = torch.library.custom_op("gptoss_dist::block_attention_backward", backward, mutates_args=())


@_backward.register_fake
def _(do_BTHD, q_BTHD, k_BSKD, v_BSKD, o_BTHD, lse_HBT, first_BT, scale, kernel):
    return tuple(x.new_empty(x.shape, dtype=lse_HBT.dtype) for x in (q_BTHD, k_BSKD, v_BSKD))


block_attention = _forward
"""`forward` as an operator that torch.compile and the planner's traces see as one."""
block_attention_backward = _backward
"""`backward` in the same way."""


# CPU: the kernel takes rectangles, so that nothing is masked; documents are found by looking at them. ----------------


def _rectangles(q_BTHD: Tensor, S: int, first_BT: Tensor | None) -> list[tuple[slice, slice, slice]]:
    """Return slices of the batch, of the queries that see any key, and of the keys that they see."""
    if first_BT is None:
        return [(slice(None), slice(None), slice(None))]
    sizes = torch.stack([(first_BT < S).sum(1), first_BT[:, 0]]).tolist()
    return [(slice(b, b + 1), slice(0, T), slice(first, S)) for b, (T, first) in enumerate(zip(*sizes)) if T]


def _cpu_forward(q_BTHD, k_BSKD, v_BSKD, first_BT, scale):
    B, T, H, _ = q_BTHD.shape
    exact = torch.promote_types(q_BTHD.dtype, torch.float32)
    o_BTHD = q_BTHD.new_zeros(q_BTHD.shape, dtype=exact)
    lse_HBT = q_BTHD.new_full((H, B, T), float("-inf"), dtype=exact)
    for batch, queries, keys in _rectangles(q_BTHD, k_BSKD.shape[1], first_BT):
        q_BKRD = group_heads(q_BTHD[batch, queries].to(exact), k_BSKD.shape[2])
        k_BKSD, v_BKSD = (x[batch, keys].to(exact).transpose(1, 2) for x in (k_BSKD, v_BSKD))
        o_BKRD, lse_BKR = aten._scaled_dot_product_flash_attention_for_cpu(
            q_BKRD, k_BKSD, v_BKSD, 0.0, False, scale=scale
        )
        o_BTHD[batch, queries] = ungroup_heads(o_BKRD, H)
        lse_HBT[:, batch, queries] = ungroup_heads(lse_BKR[..., None], H)[..., 0].permute(2, 0, 1)
    return o_BTHD, lse_HBT


def _cpu_backward(do_BTHD, q_BTHD, k_BSKD, v_BSKD, o_BTHD, lse_HBT, first_BT, scale):
    H, K, exact = q_BTHD.shape[2], k_BSKD.shape[2], lse_HBT.dtype
    dq_BTHD, dk_BSKD, dv_BSKD = (x.new_zeros(x.shape, dtype=exact) for x in (q_BTHD, k_BSKD, v_BSKD))
    for batch, queries, keys in _rectangles(q_BTHD, k_BSKD.shape[1], first_BT):
        do_BKRD, q_BKRD, o_BKRD = (group_heads(x[batch, queries].to(exact), K) for x in (do_BTHD, q_BTHD, o_BTHD))
        k_BKSD, v_BKSD = (x[batch, keys].to(exact).transpose(1, 2) for x in (k_BSKD, v_BSKD))
        lse_BKR = group_heads(lse_HBT[:, batch, queries].permute(1, 2, 0)[..., None], K)[..., 0]
        dq_BKRD, dk_BKSD, dv_BKSD = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do_BKRD, q_BKRD, k_BKSD, v_BKSD, o_BKRD, lse_BKR, 0.0, False, scale=scale
        )
        dq_BTHD[batch, queries] = ungroup_heads(dq_BKRD, H)
        dk_BSKD[batch, keys] = dk_BKSD.transpose(1, 2)
        dv_BSKD[batch, keys] = dv_BKSD.transpose(1, 2)
    return dq_BTHD, dk_BSKD, dv_BSKD


# Any device: strips of queries, one after the other, with a mask. ----------------------------------------------------


def _scores(q_BTHD, k_BKSD, first_BT, strip: slice, scale: float) -> Tensor:
    """Return the scores of a strip in k's dtype, -inf where hidden, [B, K, R, S]."""
    _, K, S, _ = k_BKSD.shape
    scores_BKRS = (group_heads(q_BTHD[:, strip].to(k_BKSD.dtype), K) @ k_BKSD.mT).mul_(scale)
    if first_BT is None:
        return scores_BKRS
    hidden_BCS = torch.arange(S, device=q_BTHD.device) < first_BT[:, strip, None]
    G = q_BTHD.shape[2] // K
    return scores_BKRS.masked_fill_(hidden_BCS.repeat_interleave(G, 1)[:, None], float("-inf"))


def _strips(q_BTHD: Tensor, K: int) -> list[slice]:
    _, T, H, _ = q_BTHD.shape
    C = max(1, ROWS_PER_STRIP * K // H)
    return [slice(start, start + C) for start in range(0, T, C)]


def _chunked_forward(q_BTHD, k_BSKD, v_BSKD, first_BT, scale):
    B, T, H, _ = q_BTHD.shape
    exact = torch.promote_types(q_BTHD.dtype, torch.float32)
    k_BKSD, v_BKSD = (x.to(exact).transpose(1, 2) for x in (k_BSKD, v_BSKD))
    o_BTHD, lse_HBT = q_BTHD.new_empty(q_BTHD.shape, dtype=exact), q_BTHD.new_empty((H, B, T), dtype=exact)
    for strip in _strips(q_BTHD, k_BSKD.shape[2]):
        scores_BKRS = _scores(q_BTHD, k_BKSD, first_BT, strip, scale)
        lse_BKR = scores_BKRS.logsumexp(-1)
        finite_BKR = torch.where(lse_BKR.isneginf(), 0.0, lse_BKR)  # of a query that sees nothing: exp(-inf) is 0
        o_BTHD[:, strip] = ungroup_heads(scores_BKRS.sub_(finite_BKR[..., None]).exp_() @ v_BKSD, H)
        lse_HBT[:, :, strip] = ungroup_heads(lse_BKR[..., None], H)[..., 0].permute(2, 0, 1)
    return o_BTHD, lse_HBT


def _chunked_backward(do_BTHD, q_BTHD, k_BSKD, v_BSKD, o_BTHD, lse_HBT, first_BT, scale):
    H, K, exact = q_BTHD.shape[2], k_BSKD.shape[2], lse_HBT.dtype
    k_BKSD, v_BKSD = (x.to(exact).transpose(1, 2) for x in (k_BSKD, v_BSKD))
    dq_BTHD = q_BTHD.new_empty(q_BTHD.shape, dtype=exact)
    dk_BKSD, dv_BKSD = torch.zeros_like(k_BKSD), torch.zeros_like(v_BKSD)
    for strip in _strips(q_BTHD, K):
        do_BKRD, q_BKRD, o_BKRD = (group_heads(x[:, strip].to(exact), K) for x in (do_BTHD, q_BTHD, o_BTHD))
        lse_BKR1 = group_heads(lse_HBT[:, :, strip].permute(1, 2, 0)[..., None], K)
        p_BKRS = _scores(q_BTHD, k_BKSD, first_BT, strip, scale).sub_(lse_BKR1).exp_()
        dv_BKSD += p_BKRS.mT @ do_BKRD
        ds_BKRS = (do_BKRD @ v_BKSD.mT).sub_((do_BKRD * o_BKRD).sum(-1, keepdim=True)).mul_(p_BKRS).mul_(scale)
        dq_BTHD[:, strip] = ungroup_heads(ds_BKRS @ k_BKSD, H)
        dk_BKSD += ds_BKRS.mT @ q_BKRD
    return dq_BTHD, dk_BKSD.transpose(1, 2).contiguous(), dv_BKSD.transpose(1, 2).contiguous()
