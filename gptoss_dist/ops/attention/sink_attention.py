"""Causal attention with learned sinks, within a window and within documents if asked: one function, four back ends.

A sink is one learned logit per query head that joins the softmax and carries no value (GPT-OSS, arXiv:2508.10925;
Xiao et al., arXiv:2309.17453): it lets a head attend to nothing. Query i sees key j iff 0 <= i - j < window and both
lie in the same document.

Flash kernels know no sinks, yet give them exactly. With the kernel's output o and log-sum-exp lse of the scores,

    lse' = logaddexp(lse, sink),    o' = o * exp(lse - lse'),

and a flash *backward* kernel rebuilds probabilities as exp(score - lse), so that feeding it (o', lse') yields exact dq,
dk and dv, while dsink = -sum(exp(sink - lse') * rowsum(do * o')). Only o' and lse' are kept: memory is linear in T.

`reference`, below, is the definition and holds all T x T scores. `chunked` (`tiled.py`) is plain PyTorch in O(T)
memory on any device. `flash` (`tiled.py` on CPU, `cuda.py`; sinks' gradient: `kernel_op.py`) uses the device's flash
kernels (CPU: any floating dtype; CUDA: bf16 or fp16, D a multiple of 8 up to 256). `fused` (`tiled.py`), for bf16 on
CPU, multiplies matrices in bf16, rounding scores to it, around one pass of torch.compile (it needs a C++ compiler).
`auto` takes `fused` inside of torch.compile if the CPU has instructions for bf16 products, else `flash`, else
`chunked`: the first of these that can serve.

Shapes: B batch, T tokens, S keys, H query heads, K key/value heads, G = H / K query heads per key/value head,
D head_dim, N = B * T tokens in all.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gptoss_dist.ops import gemm
from gptoss_dist.ops.attention import cuda, tiled
from gptoss_dist.ops.attention.documents import Documents
from gptoss_dist.ops.attention.kernel_op import attend
from gptoss_dist.ops.backends import Backend, choose, serves_all, table


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
    """Return causal grouped-query attention with sinks.

    Args:
        q_BHTD: Queries, of any floating dtype. A transposed view of [B, T, H, D] is best: no back end then copies it.
        k_BKTD: Keys, of the same dtype and best laid out alike; H is a multiple of K.
        v_BKTD: Values, like the keys.
        sinks_H: One logit per query head, of any floating dtype; `scale` does not apply to it.
        scale: Factor on q . k, 1 / sqrt(D) by default.
        window: How many keys a query sees, itself included; None for all earlier ones.
        documents: Where documents lie, from `locate_documents`: attention stays within each. None if every sequence is
            one document.
        backend: `auto`, or a name in `BACKENDS`; this file's docstring tells them apart.

    Returns:
        o_BHTD in q's dtype: a transposed view of a contiguous [B, T, H, D].

    Raises:
        ValueError: Shapes or dtypes do not fit, the window is below 1, or the back end is unknown or cannot serve.
    """
    _check(q_BHTD, k_BKTD, v_BKTD, sinks_H, window, documents)
    T, D = q_BHTD.shape[2:]
    scale = D**-0.5 if scale is None else scale
    window = None if window is None or window >= T else window
    # `fused` rounds more often, so that it is for those who asked for speed by compiling, and where it brings any.
    compiled = torch.compiler.is_compiling() and gemm.CPU_MULTIPLIES_BF16
    order = ("fused", *AUTO_ORDER) if compiled else AUTO_ORDER
    chosen = choose(BACKENDS, backend, order, q_BHTD.dtype, (D,), q_BHTD.device)
    return chosen.run(q_BHTD, k_BKTD, v_BKTD, sinks_H, scale, window, documents)


def masked_sink_attention(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    sinks_H: Tensor,
    visible: Tensor | None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Return attention with sinks under any mask: the definition, and what decoding with a key/value cache calls.

    Query heads that share keys are folded into the rows of one matrix product, so keys and values are never repeated.
    With B > 1, keep a cache as [B, K, S, D] in memory (not [B, S, K, D]): other layouts are copied by the product.

    Args:
        q_BHTD: Queries, of any floating dtype.
        k_BKSD: Keys; S and T are independent.
        v_BKSD: Values.
        sinks_H: One logit per query head.
        visible: bool [T, S] or [B, T, S], true where the query sees the key. A query that sees nothing gets zeros.
            None if every query sees every key.
        scale: Factor on q . k, 1 / sqrt(D) by default.

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
    if visible is not None:
        visible = visible[:, None, None] if visible.dim() == 3 else visible
        scores_BKGTS = scores_BKGTS.masked_fill(~visible, float("-inf"))
    sinks_BKGT1 = sinks_H.to(scores_BKGTS.dtype).view(1, K, G, 1, 1).expand(B, K, G, T, 1)
    probability_BKGTS = torch.cat((scores_BKGTS, sinks_BKGT1), dim=-1).softmax(dim=-1)[..., :-1]
    o_BKRD = probability_BKGTS.to(dtype).reshape(B, K, G * T, S) @ v_BKSD.to(dtype)
    return o_BKRD.to(q_BHTD.dtype).view(B, H, T, D)


def causal_visibility(T: int, window: int | None, documents: Documents | None, device: torch.device) -> Tensor:
    """Return which keys a query sees as a bool mask, [T, T], or [B, T, T] with documents."""
    position_T = torch.arange(T, device=device)
    distance_TT = position_T[:, None] - position_T
    visible = (distance_TT >= 0) & (distance_TT < (T if window is None else window))
    if documents is not None:
        visible = visible & (documents.first_BT[:, :, None] == documents.first_BT[:, None, :])
    return visible


def _by_definition(q_BHTD, k_BKTD, v_BKTD, sinks_H, scale, window, documents) -> Tensor:
    visible = causal_visibility(q_BHTD.shape[2], window, documents, q_BHTD.device)
    return masked_sink_attention(q_BHTD, k_BKTD, v_BKTD, sinks_H, visible, scale=scale)


def _why_not_flash(dtype: torch.dtype, sizes: tuple[int, ...], device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    # The meta device computes nothing, and stands for CUDA.
    is_cuda = device.type in ("cuda", "meta")
    return cuda.why_not(dtype, sizes, device) if is_cuda else f"has no kernel on {device.type}"


BACKENDS = table(
    Backend("flash", _why_not_flash, functools.partial(attend, "flash")),
    Backend("fused", tiled.why_not_fused, functools.partial(attend, "fused")),
    Backend("chunked", serves_all, functools.partial(attend, "chunked")),
    Backend("reference", serves_all, _by_definition),
)
"""Sizes are (D,). `run` takes q_BHTD, k_BKTD, v_BKTD, sinks_H, scale, window and documents, and returns o_BHTD."""

AUTO_ORDER = ("flash", "chunked")
"""What `auto` tries outside of torch.compile."""


def _check(q, k, v, sinks, window, documents) -> None:
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
