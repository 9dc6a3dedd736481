"""The fast kernels of sink attention as one custom operator, whatever the device.

A custom operator is opaque to torch.compile (no graph break, no tracing of the tile loops), and selective activation
checkpointing can name it as an operation whose output is worth keeping.

Shapes: B batch, T tokens, H query heads, K key/value heads, D head_dim, N = B * T tokens in all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gptoss_dist.ops.attention import cuda, tiled
from gptoss_dist.ops.attention.documents import Documents


def attend(
    kernel: str,
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    sinks_H: Tensor,
    scale: float,
    window: int | None,
    documents: Documents | None,
) -> Tensor:
    """Compute o_BHTD, a transposed view of a contiguous [B, T, H, D], by the kernel of this name.

    Args:
        kernel: `flash` for the device's own, `fused` or `chunked` (see `tiled.py`).
        q_BHTD: Queries.
        k_BKTD: Keys, of the same dtype.
        v_BKTD: Values, of the same dtype.
        sinks_H: One logit per query head, of any floating dtype.
        scale: Factor on q . k.
        window: How many keys a query sees, or None for all earlier ones.
        documents: Where documents lie, or None.
    """
    borders = (None, None, q_BHTD.shape[2]) if documents is None else documents
    q_BTHD, k_BTKD, v_BTKD = (x.transpose(1, 2) for x in (q_BHTD, k_BKTD, v_BKTD))
    o_BTHD, _ = _attend(q_BTHD, k_BTKD, v_BTKD, sinks_H, scale, window, *borders, kernel)
    return o_BTHD.transpose(1, 2)


def forward(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    sinks_H: Tensor,
    scale: float,
    window: int | None,
    first_BT: Tensor | None,
    cu_seqlens: Tensor | None,
    longest: int,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Return o_BTHD, contiguous, and lse_HN in float32 (float64 for float64 inputs), both with the sinks counted in."""
    if kernel == "flash" and q_BTHD.device.type != "cpu":
        return cuda.forward(q_BTHD, k_BTKD, v_BTKD, sinks_H, scale, window, cu_seqlens, longest)
    return tiled.forward(q_BTHD, k_BTKD, v_BTKD, sinks_H, scale, window, first_BT, kernel)


_attend = torch.library.custom_op("gptoss_dist::sink_attention", forward, mutates_args=())


@_attend.register_fake
def _(q_BTHD, k_BTKD, v_BTKD, sinks_H, scale, window, first_BT, cu_seqlens, longest, kernel):
    B, T, H, _ = q_BTHD.shape
    lse_dtype = torch.promote_types(q_BTHD.dtype, torch.float32)
    return q_BTHD.new_empty(q_BTHD.shape), q_BTHD.new_empty((H, B * T), dtype=lse_dtype)


def backward(
    do_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    sinks_H: Tensor,
    o_BTHD: Tensor,
    lse_HN: Tensor,
    scale: float,
    window: int | None,
    first_BT: Tensor | None,
    cu_seqlens: Tensor | None,
    longest: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq_BTHD, dk_BTKD, dv_BTKD, contiguous, and dsinks_H, each in its input's dtype."""
    tensors = (do_BTHD, q_BTHD, k_BTKD, v_BTKD, o_BTHD, lse_HN)
    if kernel == "flash" and q_BTHD.device.type != "cpu":
        dq, dk, dv = cuda.backward(*tensors, scale, window, cu_seqlens, longest)
    else:
        dq, dk, dv = tiled.backward(*tensors, scale, window, first_BT, kernel)
    do_o_HN = (do_BTHD.to(lse_HN.dtype) * o_BTHD).sum(-1).flatten(0, 1).t()
    sink_probability_HN = torch.exp(sinks_H.to(lse_HN.dtype)[:, None] - lse_HN)
    dsinks_H = -(sink_probability_HN * do_o_HN).sum(1).to(sinks_H.dtype)
    return dq, dk, dv, dsinks_H


_attend_backward = torch.library.custom_op("gptoss_dist::sink_attention_backward", backward, mutates_args=())


@_attend_backward.register_fake
def _(do_BTHD, q_BTHD, k_BTKD, v_BTKD, sinks_H, o_BTHD, lse_HN, *_):
    return tuple(x.new_empty(x.shape) for x in (q_BTHD, k_BTKD, v_BTKD, sinks_H))


def _save_for_backward(ctx, inputs, output) -> None:
    q, k, v, sinks, ctx.scale, ctx.window, first_BT, cu_seqlens, ctx.longest, ctx.kernel = inputs
    ctx.save_for_backward(q, k, v, sinks, *output, first_BT, cu_seqlens)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, do_BTHD: Tensor, _):
    q, k, v, sinks, o, lse, first_BT, cu_seqlens = ctx.saved_tensors
    options = (ctx.scale, ctx.window, first_BT, cu_seqlens, ctx.longest, ctx.kernel)
    return *_attend_backward(do_BTHD, q, k, v, sinks, o, lse, *options), *[None] * 6


def attend_with_lse(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    sinks_H: Tensor,
    scale: float,
    documents: Documents | None,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Return what `forward` does without a window, for who differentiates it with `differentiate`."""
    borders = (None, None, q_BTHD.shape[1]) if documents is None else documents
    return _attend(q_BTHD, k_BTKD, v_BTKD, sinks_H, scale, None, *borders, kernel)


def differentiate(
    do_BTHD: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    o_BTHD: Tensor,
    lse_HN: Tensor,
    scale: float,
    documents: Documents | None,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and sinks, the `inputs` of `attend_with_lse`.

    Args:
        do_BTHD: Gradient of o.
        inputs: q_BTHD, k_BTKD, v_BTKD and sinks_H.
        o_BTHD: The output. Where the queries see further keys elsewhere, it is that of all of them together.
        lse_HN: Its log-sum-exp.
        scale: As in the forward pass.
        documents: As in the forward pass.
        kernel: As in the forward pass.
    """
    borders = (None, None, do_BTHD.shape[1]) if documents is None else documents
    return _attend_backward(do_BTHD, *inputs, o_BTHD, lse_HN, scale, None, *borders, kernel)


_attend.register_autograd(_differentiate, setup_context=_save_for_backward)

KERNELS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "gptoss_dist::sink_attention": forward,
    "gptoss_dist::sink_attention_backward": backward,
}
"""What the custom operators run, by name; `planner/tracing/cuda_trace.py` looks into them. Meta goes CUDA's way."""
