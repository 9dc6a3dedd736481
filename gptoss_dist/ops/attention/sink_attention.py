"""Causal attention with learned sinks, optionally windowed and within documents: one function, several back ends.

A sink is one learned logit per query head that joins the softmax and carries no value (GPT-OSS, arXiv:2508.10925;
Xiao et al., arXiv:2309.17453): it lets a head attend to nothing. Query i sees key j iff 0 <= i - j < window and both
lie in the same document.

Flash kernels know no sinks, yet give them exactly. With the kernel's output o and log-sum-exp lse of the scores,

    lse' = logaddexp(lse, sink),    o' = o * exp(lse - lse'),

and a flash *backward* kernel rebuilds probabilities as exp(score - lse), so that feeding it (o', lse') yields exact dq,
dk and dv, while dsink = -sum(exp(sink - lse') * rowsum(do * o')). Only o' and lse' are kept: memory is linear in T.

Shapes: B batch, T tokens, S keys, H query heads, K key/value heads, G = H / K query heads per key/value head,
D head_dim, N = B * T tokens in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_dist.ops import gemm
from gptoss_dist.ops.attention import cuda as sink_attention_cuda
from gptoss_dist.ops.attention import tiled as sink_attention_tiled
from gptoss_dist.ops.attention.documents import Documents

BACKENDS = ("auto", "flash", "fused", "chunked", "reference")


def sink_attention(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    sinks_H: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal grouped-query attention with sinks.

    Args:
        q_BHTD, k_BKTD, v_BKTD: one floating dtype, H a multiple of K; a transposed view of [B, T, heads, D] is best, as
            no back end then copies it.
        sinks_H: one logit per query head, any floating dtype; not scaled by `scale`.
        scale: factor on q . k, 1 / sqrt(D) by default.
        window: keys visible to a query, itself included; None for all earlier ones.
        documents: where documents lie, from `locate_documents`: attention stays within each. None if every sequence is
            one document.
        backend: `reference` holds all T x T scores; `chunked` is plain PyTorch in O(T) memory on any device; `flash`
            uses the device's flash kernels (CPU: any floating dtype; CUDA: bf16 or fp16, D a multiple of 8 up to 256);
            `fused`, for bf16 on CPU, multiplies matrices in bf16, rounding scores to it, around one pass of
            torch.compile (it needs a C++ compiler); `auto` takes fused inside of torch.compile where it applies and
            the CPU has instructions for bf16 products, then flash where it applies, and chunked elsewhere.

    Returns:
        o_BHTD in q's dtype: a transposed view of a contiguous [B, T, H, D].

    Raises:
        ValueError: shapes or dtypes that do not fit, a window below 1, or an unknown back end or one that does not
            apply.
    """
    _check(q_BHTD, k_BKTD, v_BKTD, sinks_H, window, documents, backend)
    T, D = q_BHTD.shape[2:]
    scale = D**-0.5 if scale is None else scale
    window = None if window is None or window >= T else window
    if backend == "reference":
        visible = causal_visibility(T, window, documents, q_BHTD.device)
        return masked_sink_attention(q_BHTD, k_BKTD, v_BKTD, sinks_H, visible, scale=scale)
    kernel = _select_kernel(q_BHTD, backend)
    borders = (None, None, T) if documents is None else documents
    q_BTHD, k_BTKD, v_BTKD = (x.transpose(1, 2) for x in (q_BHTD, k_BKTD, v_BKTD))
    o_BTHD, _ = _attend(q_BTHD, k_BTKD, v_BTKD, sinks_H, scale, window, *borders, kernel)
    return o_BTHD.transpose(1, 2)


def masked_sink_attention(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    sinks_H: Tensor,
    visible: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention with sinks under any mask: the definition, and what decoding with a key/value cache calls.

    Query heads that share keys are folded into the rows of one matrix product, so keys and values are never repeated.
    With B > 1, keep a cache as [B, K, S, D] in memory (not [B, S, K, D]): other layouts are copied by the product.

    Args:
        q_BHTD, k_BKSD, v_BKSD: queries, keys and values; S and T are independent.
        sinks_H: one logit per query head.
        visible: bool [T, S] or [B, T, S], true where the query sees the key. A query that sees nothing returns zeros.
        scale: factor on q . k, 1 / sqrt(D) by default.

    Returns:
        o_BHTD in q's dtype. Memory is O(H * T * S).
    """
    B, H, T, D = q_BHTD.shape
    K, S = k_BKSD.shape[1:3]
    G = H // K
    scale = D**-0.5 if scale is None else scale
    dtype = gemm.gemm_dtype(q_BHTD, rows=G * T)
    q_BKRD = q_BHTD.reshape(B, K, G * T, D)
    scores_BKGTS = (q_BKRD.to(dtype) @ k_BKSD.to(dtype).transpose(-1, -2)).view(B, K, G, T, S)
    scores_BKGTS = scores_BKGTS.to(torch.promote_types(q_BHTD.dtype, torch.float32)) * scale
    visible = visible[:, None, None] if visible.dim() == 3 else visible
    scores_BKGTS = scores_BKGTS.masked_fill(~visible, float("-inf"))
    sinks_BKGT1 = sinks_H.to(scores_BKGTS.dtype).view(1, K, G, 1, 1).expand(B, K, G, T, 1)
    probability_BKGTS = torch.cat((scores_BKGTS, sinks_BKGT1), dim=-1).softmax(dim=-1)[..., :-1]
    o_BKRD = probability_BKGTS.to(dtype).reshape(B, K, G * T, S) @ v_BKSD.to(dtype)
    return o_BKRD.to(q_BHTD.dtype).view(B, H, T, D)


def causal_visibility(T: int, window: int | None, documents: Documents | None, device: torch.device) -> Tensor:
    """Bool mask of which keys a query sees, [T, T], or [B, T, T] with documents."""
    position_T = torch.arange(T, device=device)
    distance_TT = position_T[:, None] - position_T
    visible = (distance_TT >= 0) & (distance_TT < (T if window is None else window))
    if documents is not None:
        visible = visible & (documents.first_BT[:, :, None] == documents.first_BT[:, None, :])
    return visible


def _select_kernel(q: Tensor, backend: str) -> str:
    if backend == "chunked":
        return "chunked"
    device, dtype, D = q.device.type, q.dtype, q.shape[-1]
    fusable = device == "cpu" and dtype == torch.bfloat16  # float16 could not hold unscaled scores
    worthwhile = torch.compiler.is_compiling() and gemm.CPU_MULTIPLIES_BF16
    if fusable and (backend == "fused" or (backend == "auto" and worthwhile)):
        return "fused_cpu"
    flash = {"cpu": "flash_cpu", "cuda": "flash_cuda"}.get(device)
    if flash == "flash_cuda" and not sink_attention_cuda.is_supported(q):
        flash = None
    if backend == "fused" or (flash is None and backend == "flash"):
        raise ValueError(
            f"backend {backend!r} has no kernel for {dtype}, head_dim {D} on {device}; use 'auto' or 'chunked'"
        )
    return flash or "chunked"


def _check(q, k, v, sinks, window, documents, backend) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    B, H, T, D = q.shape
    K = k.shape[1]
    if k.shape != (B, K, T, D) or v.shape != k.shape or H % K:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; "
            "need [B, H, T, D] and twice [B, K, T, D] with H a multiple of K"
        )
    if sinks.shape != (H,):
        raise ValueError(f"sinks have shape {tuple(sinks.shape)}; need one per query head, ({H},)")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; cast them to one")
    if window is not None and window < 1:
        raise ValueError(f"window {window} hides every key; need at least 1 (the query itself), or None for no window")
    if documents is not None and documents.first_BT.shape != (B, T):
        raise ValueError(f"document_ids_BT has shape {tuple(documents.first_BT.shape)}; need ({B}, {T})")


# Custom ops are opaque to torch.compile (no graph break, no tracing of the tile loops) and let selective activation
# checkpointing name attention as an op whose output is worth keeping.


@torch.library.custom_op("gptoss_dist::sink_attention", mutates_args=())
def _attend(
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
    """o_BTHD, contiguous, and lse_HN in float32 (float64 for float64 inputs), both with the sinks counted in."""
    if kernel == "flash_cuda":
        return sink_attention_cuda.forward(q_BTHD, k_BTKD, v_BTKD, sinks_H, scale, window, cu_seqlens, longest)
    return sink_attention_tiled.forward(q_BTHD, k_BTKD, v_BTKD, sinks_H, scale, window, first_BT, kernel)


@_attend.register_fake
def _(q_BTHD, k_BTKD, v_BTKD, sinks_H, scale, window, first_BT, cu_seqlens, longest, kernel):
    B, T, H, _ = q_BTHD.shape
    lse_dtype = torch.promote_types(q_BTHD.dtype, torch.float32)
    return q_BTHD.new_empty(q_BTHD.shape), q_BTHD.new_empty((H, B * T), dtype=lse_dtype)


@torch.library.custom_op("gptoss_dist::sink_attention_backward", mutates_args=())
def _attend_backward(
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
    """dq_BTHD, dk_BTKD, dv_BTKD, contiguous, and dsinks_H, each in its input's dtype."""
    tensors = (do_BTHD, q_BTHD, k_BTKD, v_BTKD, o_BTHD, lse_HN)
    if kernel == "flash_cuda":
        dq, dk, dv = sink_attention_cuda.backward(*tensors, scale, window, cu_seqlens, longest)
    else:
        dq, dk, dv = sink_attention_tiled.backward(*tensors, scale, window, first_BT, kernel)
    do_o_HN = (do_BTHD.to(lse_HN.dtype) * o_BTHD).sum(-1).flatten(0, 1).t()
    sink_probability_HN = torch.exp(sinks_H.to(lse_HN.dtype)[:, None] - lse_HN)
    dsinks_H = -(sink_probability_HN * do_o_HN).sum(1).to(sinks_H.dtype)
    return dq, dk, dv, dsinks_H


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


_attend.register_autograd(_differentiate, setup_context=_save_for_backward)
