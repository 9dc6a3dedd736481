"""Sink attention in tiles of queries, by one of three kernels.

`chunked` is plain PyTorch on any device, `flash` is the flash kernel for CPU, and `fused` multiplies matrices in bf16
around one compiled pass.

A tile is a block of consecutive queries, the keys that it can see, and a mask. There are two tilings:
- strips, one tile after the other: no keys beyond the last query, none before the window or the document. The CPU
  kernel by itself skips hidden keys in steps of 512 only, so strips pay even where plain causal attention would do;
- a band, for windows: every block of queries reads the keys of its own and the preceding blocks through an overlapping
  view, all blocks in one kernel call. Work is linear in T, and nothing is copied per block.

The query heads that share a key/value head become rows of one tile: keys are never repeated, and their gradients come
out summed over the group. Tiles compute in float32 at least, since the CPU flash kernel gains nothing from bf16 and
its backward would accumulate gradients in it; `fused` alone keeps bf16 for the operands and results of its
matrix products, scores among them, and float32 between them.

Shapes: B batch, T tokens, H query heads, K key/value heads, G = H / K, D head_dim, N = B * T tokens; within tiles
M tiles in one call, C queries in a tile, R = C * G rows, S keys of a tile, P blocks in a padded sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gptoss_dist.ops.backends import BF16_ONLY

ROWS_PER_STRIP = 512
"""Rows (queries times heads of a group) at which the CPU kernel is fastest at T >= 2048 (docs/log.md)."""
KEYS_PER_CALL = {"flash": 16384, "chunked": 2048}
"""Earlier keys that `forward_unmasked` casts, and attends to, at a time."""
MIN_BLOCK = 32
"""Queries per band block for windows up to 256; the CPU kernel splits short tiles into 32 rows."""


def why_not_fused(dtype: torch.dtype, sizes: tuple[int, ...], device: torch.device) -> str | None:
    """Say why `fused` cannot serve operands like these: float16 could not hold unscaled scores."""
    if dtype != torch.bfloat16:
        return BF16_ONLY
    return None if device.type == "cpu" else "computes on CPU only"


def forward(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    sinks_H: Tensor,
    scale: float,
    window: int | None,
    first_BT: Tensor | None,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Return o_BTHD and lse_HN, both with the sinks counted in; arguments as in `kernel_op.py`."""
    B, T, H, _ = q_BTHD.shape
    K = k_BTKD.shape[2]
    exact = torch.promote_types(q_BTHD.dtype, torch.float32)
    attend, dtype = _KERNELS[kernel].forward, _tile_dtype(q_BTHD, kernel)
    sinks_KG = sinks_H.to(exact).view(K, H // K)

    def attend_tile(q_MKRD, k_MKSD, v_MKSD, bias_M1RS):
        C = q_MKRD.shape[2] // sinks_KG.shape[1]
        sinks_KR = sinks_KG[:, None].expand(-1, C, -1).flatten(1)
        return attend(q_MKRD, k_MKSD, v_MKSD, bias_M1RS, sinks_KR, scale)

    band = Band.of(T, window, K, kernel)
    if band is not None:
        o_MKRD, lse_MKR = attend_tile(
            band.queries(q_BTHD, dtype),
            band.keys(k_BTKD, dtype),
            band.keys(v_BTKD, dtype),
            band.bias(B, H // K, first_BT, exact, q_BTHD.device),
        )
        o_BTHD = band.ungroup(o_MKRD, B).to(q_BTHD.dtype).contiguous()
        lse_BTH = band.ungroup(lse_MKR[..., None], B)[..., 0]
        return o_BTHD, lse_BTH.permute(2, 0, 1).contiguous().view(H, B * T)

    o_BTHD = q_BTHD.new_empty(q_BTHD.shape)
    lse_HBT = q_BTHD.new_empty((H, B, T), dtype=exact)
    k_BKTD, v_BKTD = k_BTKD.to(dtype).transpose(1, 2), v_BTKD.to(dtype).transpose(1, 2)
    for strip in _strips(q_BTHD, K, window, first_BT):
        batch, queries, keys = strip
        q_MKRD = group_heads(q_BTHD[batch, queries].to(dtype), K)
        bias_M1RS = _strip_bias(strip, window, first_BT, H // K, exact, q_BTHD.device)
        o_MKRD, lse_MKR = attend_tile(q_MKRD, k_BKTD[batch, :, keys], v_BKTD[batch, :, keys], bias_M1RS)
        o_BTHD[batch, queries] = ungroup_heads(o_MKRD, H)
        lse_HBT[:, batch, queries] = ungroup_heads(lse_MKR[..., None], H)[..., 0].permute(2, 0, 1)
    return o_BTHD, lse_HBT.flatten(1)


def backward(
    do_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    o_BTHD: Tensor,
    lse_HN: Tensor,
    scale: float,
    window: int | None,
    first_BT: Tensor | None,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq_BTHD, dk_BTKD, dv_BTKD, given what `forward` returned as o and lse."""
    B, T, H, _ = q_BTHD.shape
    K, exact, dtype = k_BTKD.shape[2], lse_HN.dtype, _tile_dtype(q_BTHD, kernel)
    differentiate = _KERNELS[kernel].backward
    lse_BTH1 = lse_HN.view(H, B, T).permute(1, 2, 0)[..., None]

    band = Band.of(T, window, K, kernel)
    if band is not None:
        dq_MKRD, dk_MKSD, dv_MKSD = differentiate(
            band.queries(do_BTHD, dtype),
            band.queries(q_BTHD, dtype),
            band.keys(k_BTKD, dtype),
            band.keys(v_BTKD, dtype),
            band.queries(o_BTHD, dtype),
            band.queries(lse_BTH1, exact)[..., 0],
            band.bias(B, H // K, first_BT, exact, q_BTHD.device),
            scale,
        )
        dq_BTHD = band.ungroup(dq_MKRD, B).to(q_BTHD.dtype).contiguous()
        dk_BTKD, dv_BTKD = (band.sum_keys(x, B).to(q_BTHD.dtype).contiguous() for x in (dk_MKSD, dv_MKSD))
        return dq_BTHD, dk_BTKD, dv_BTKD

    dq_BTHD = q_BTHD.new_empty(q_BTHD.shape)
    dk_BTKD = k_BTKD.new_zeros(k_BTKD.shape, dtype=exact)
    dv_BTKD = torch.zeros_like(dk_BTKD)
    k_BKTD, v_BKTD = k_BTKD.to(dtype).transpose(1, 2), v_BTKD.to(dtype).transpose(1, 2)
    for strip in _strips(q_BTHD, K, window, first_BT):
        batch, queries, keys = strip
        do_MKRD, q_MKRD, o_MKRD = (group_heads(x[batch, queries].to(dtype), K) for x in (do_BTHD, q_BTHD, o_BTHD))
        dq_MKRD, dk_MKSD, dv_MKSD = differentiate(
            do_MKRD,
            q_MKRD,
            k_BKTD[batch, :, keys],
            v_BKTD[batch, :, keys],
            o_MKRD,
            group_heads(lse_BTH1[batch, queries], K)[..., 0],
            _strip_bias(strip, window, first_BT, H // K, exact, q_BTHD.device),
            scale,
        )
        dq_BTHD[batch, queries] = ungroup_heads(dq_MKRD, H)
        dk_BTKD[batch, keys] += dk_MKSD.transpose(1, 2)
        dv_BTKD[batch, keys] += dv_MKSD.transpose(1, 2)
    return dq_BTHD, dk_BTKD.to(k_BTKD.dtype), dv_BTKD.to(v_BTKD.dtype)


def forward_unmasked(
    q_BTHD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """Return attention of every query to every key, without sinks: o_BTHD and lse_BTH, in float32 at least.

    Keys and values are cast by blocks, whose results are merged: what this needs beside them does not grow with S.
    The kernel is `flash`, on CPU, or `chunked`.
    """
    H, K = q_BTHD.shape[2], k_BKSD.shape[1]
    dtype, exact = _tile_dtype(q_BTHD, kernel), torch.promote_types(q_BTHD.dtype, torch.float32)
    attend, keys = (_flash_cpu if kernel == "flash" else _matmul), KEYS_PER_CALL[kernel]
    q_BKRD = group_heads(q_BTHD.to(dtype), K)
    strips = []
    for q_BKrD in q_BKRD.split(q_BKRD.shape[2] if kernel == "flash" else ROWS_PER_STRIP, dim=2):
        merged = None
        for k_BKsD, v_BKsD in zip(k_BKSD.split(keys, dim=2), v_BKSD.split(keys, dim=2)):
            part = attend(q_BKrD, k_BKsD.to(dtype), v_BKsD.to(dtype), None, scale)
            part = part[0].to(exact), part[1].to(exact)
            merged = part if merged is None else merge(*merged, *part)
        strips.append(merged)
    o_BKRD, lse_BKR = (torch.cat(column, dim=2) for column in zip(*strips))
    return ungroup_heads(o_BKRD, H), ungroup_heads(lse_BKR[..., None], H)[..., 0]


def merge(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention to the keys of two sets from that to each: outputs [..., D] and log-sum-exps [...]."""
    both = torch.logaddexp(lse, other_lse)
    return o * (lse - both).exp()[..., None] + other_o * (other_lse - both).exp()[..., None], both


def _tile_dtype(q_BTHD: Tensor, kernel: str) -> torch.dtype:
    return q_BTHD.dtype if kernel == "fused" else torch.promote_types(q_BTHD.dtype, torch.float32)


def group_heads(x_BCHD: Tensor, K: int) -> Tensor:
    """Turn heads that share a key/value head into rows, [B, K, C * G, D]: row c * G + g is query c, head g of G."""
    B, C, H, D = x_BCHD.shape
    return x_BCHD.reshape(B, C, K, H // K, D).transpose(1, 2).reshape(B, K, C * (H // K), D)


def ungroup_heads(x_BKRD: Tensor, H: int) -> Tensor:
    """Undo `group_heads`: [B, C, H, D]."""
    B, K, R, D = x_BKRD.shape
    G = H // K
    return x_BKRD.reshape(B, K, R // G, G, D).transpose(1, 2).reshape(B, R // G, H, D)


def _bias(lower_MC: Tensor, upper_C: Tensor, S: int, G: int, dtype: torch.dtype) -> Tensor:
    """Return 0 where lower <= key <= upper (key indices of the tile), -inf elsewhere; [M, 1, C * G, S]."""
    key_S = torch.arange(S, device=upper_C.device)
    hidden_MCS = (key_S > upper_C[:, None]) | (key_S < lower_MC[..., None])
    bias_MCS = torch.zeros(hidden_MCS.shape, dtype=dtype, device=key_S.device).masked_fill_(hidden_MCS, float("-inf"))
    return bias_MCS[:, :, None].expand(-1, -1, G, -1).flatten(1, 2)[:, None]


class Strip(NamedTuple):
    """One tile: a slice of the batch, of the queries, and of the keys that any of these queries sees."""

    batch: slice
    queries: slice
    keys: slice


def _strips(q_BTHD: Tensor, K: int, window: int | None, first_BT: Tensor | None) -> Iterator[Strip]:
    B, T, H, _ = q_BTHD.shape
    # Long sequences amortise long strips; a short one would compute much of the hidden triangle.
    C = max(min(ROWS_PER_STRIP * K // H, T // 4), MIN_BLOCK)
    if first_BT is None or window is not None or first_BT.device.type != "cpu":
        # Reading document starts back from an accelerator would stall it: hidden keys are masked there, not skipped.
        for start in range(0, T, C):
            first_key = 0 if window is None else max(0, start - window + 1)
            end = min(start + C, T)
            yield Strip(slice(0, B), slice(start, end), slice(first_key, end))
        return
    for b, first_keys in enumerate(first_BT[:, ::C].tolist()):
        for start, first_key in zip(range(0, T, C), first_keys):
            end = min(start + C, T)
            yield Strip(slice(b, b + 1), slice(start, end), slice(first_key, end))


def _strip_bias(
    strip: Strip, window: int | None, first_BT: Tensor | None, G: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    _, queries, keys = strip
    if first_BT is None:
        elements = G * (queries.stop - queries.start) * (keys.stop - keys.start)
        build = _causal_bias if device.type == "cpu" and elements <= 1 << 20 else _causal_bias.__wrapped__
        return build(queries.start, queries.stop, keys.start, window, G, dtype, device)
    position_C = torch.arange(queries.start, queries.stop, device=device)
    lower_MC = first_BT[strip.batch, queries]
    if window is not None:
        lower_MC = torch.maximum(lower_MC, position_C - (window - 1))
    return _bias(lower_MC - keys.start, position_C - keys.start, keys.stop - keys.start, G, dtype)


@functools.lru_cache(maxsize=64)  # of 4 MiB each, in float32
def _causal_bias(
    start: int, stop: int, first_key: int, window: int | None, G: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the bias of queries start ... stop - 1 and keys first_key ... stop - 1.

    It is the same in every layer and step, so that a few of them are kept.
    """
    position_C = torch.arange(start, stop, device=device)
    lower_C = torch.zeros_like(position_C) if window is None else position_C - (window - 1)
    return _bias(lower_C[None] - first_key, position_C - first_key, stop - first_key, G, dtype)


class Band(NamedTuple):
    """All blocks of C queries of a batch as tiles of one call, each with S = left + C keys that end at its last query.

    Keys lie one sequence after the other, behind `left` zero rows: tile m starts C rows after tile m - 1, also across
    sequences, so one strided view holds all tiles. What a first block sees of the sequence before it is masked.
    """

    tokens: int
    window: int
    key_heads: int
    block: int
    left: int

    @classmethod
    def of(cls, T: int, window: int | None, K: int, kernel: str) -> Band | None:
        """Return the band for sequences of T tokens with K key/value heads, or None if strips serve them better.

        `chunked` keeps whole score matrices of a call, in float32, so it takes one strip at a time. `fused` keeps them
        too, in 16 bits and within the band: still linear in T.
        """
        if window is None or kernel == "chunked":
            return None
        # An eighth of the window: small blocks compute few hidden scores, large ones amortise the kernel's overheads.
        C = MIN_BLOCK * max(1, -(-window // (8 * MIN_BLOCK)))
        return cls(T, window, K, C, C * -(-(window - 1) // C))

    @property
    def padded_tokens(self) -> int:
        """Tokens of a sequence in whole blocks."""
        return self.block * -(-self.tokens // self.block)

    def queries(self, x_BTHD: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the tiles of q, o, do or lse, [M, K, R, D], with zeros behind the last token.

        Zeros in do keep the padding out of gradients.
        """
        B, T, H, D = x_BTHD.shape
        if self.padded_tokens != T:
            padded = x_BTHD.new_zeros((B, self.padded_tokens, H, D), dtype=dtype)
            padded[:, :T] = x_BTHD
            x_BTHD = padded
        return group_heads(x_BTHD.to(dtype).reshape(-1, self.block, H, D), self.key_heads)

    def keys(self, x_BTKD: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the tiles of k or v, [M, K, S, D]: an overlapping view."""
        B, T, K, D = x_BTKD.shape
        rows = x_BTKD.new_zeros((self.left + B * self.padded_tokens, K, D), dtype=dtype)
        rows[self.left :].view(B, self.padded_tokens, K, D)[:, :T] = x_BTKD
        tiles = B * self.padded_tokens // self.block
        return rows.as_strided((tiles, K, self.left + self.block, D), (self.block * K * D, D, K * D, 1))

    def sum_keys(self, x_MKSD: Tensor, B: int) -> Tensor:
        """Return the sum of every key's gradient over the tiles that saw it, [B, T, K, D]: the adjoint of `keys`."""
        M, K, S, D = x_MKSD.shape
        dtype = torch.promote_types(x_MKSD.dtype, torch.float32)
        rows = x_MKSD.new_zeros((self.left + M * self.block, K, D), dtype=dtype)
        for start in range(0, S, self.block):
            part_MCKD = x_MKSD[:, :, start : start + self.block].transpose(1, 2)
            rows[start : start + M * self.block].view(M, self.block, K, D).add_(part_MCKD)
        return rows[self.left :].view(B, self.padded_tokens, K, D)[:, : self.tokens]

    def ungroup(self, x_MKRD: Tensor, B: int) -> Tensor:
        """Undo `queries`: [B, T, H, D]."""
        K, R = x_MKRD.shape[1:3]
        H, D = K * (R // self.block), x_MKRD.shape[-1]
        return ungroup_heads(x_MKRD, H).view(B, self.padded_tokens, H, D)[:, : self.tokens]

    def bias(self, B: int, G: int, first_BT: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the bias of all tiles, [M, 1, R, S]; without documents it is the same in every layer, and kept."""
        elements = B * self.padded_tokens * G * (self.left + self.block)
        cached = first_BT is None and device.type == "cpu" and elements <= 1 << 22
        return (_band_bias if cached else _band_bias.__wrapped__)(self, B, G, first_BT, dtype, device)


@functools.lru_cache(maxsize=4)  # of 16 MiB each, in float32
def _band_bias(band: Band, B: int, G: int, first_BT: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    C, position = band.block, torch.arange(band.padded_tokens, device=device)
    lower_BP = (position - (band.window - 1)).clamp_(min=0).repeat(B, 1)
    if first_BT is not None:
        lower_BP[:, : band.tokens] = torch.maximum(lower_BP[:, : band.tokens], first_BT)
    first_key_P = position - position % C - band.left
    upper_C = torch.arange(band.left, band.left + C, device=device)
    return _bias((lower_BP - first_key_P).view(-1, C), upper_C, band.left + C, G, dtype)


class Kernel(NamedTuple):
    """Attention within tiles, its log-sum-exps including the sinks."""

    forward: Callable
    """The forward pass: (q, k, v, bias, sinks, scale) -> (o, lse)."""
    backward: Callable
    """The backward pass: (do, q, k, v, o, lse, bias, scale) -> (dq, dk, dv)."""


def _with_sinks(o_MKRD: Tensor, lse_MKR: Tensor, sinks_KR: Tensor) -> tuple[Tensor, Tensor]:
    with_sink_MKR = torch.logaddexp(lse_MKR, sinks_KR)
    return o_MKRD.mul_(torch.exp(lse_MKR - with_sink_MKR)[..., None]), with_sink_MKR


def _matmul(q_MKRD, k_MKSD, v_MKSD, bias_M1RS, scale):
    scores_MKRS = (q_MKRD @ k_MKSD.mT).mul_(scale)
    if bias_M1RS is not None:
        scores_MKRS.add_(bias_M1RS)
    lse_MKR = scores_MKRS.logsumexp(-1)
    return scores_MKRS.sub_(lse_MKR[..., None]).exp_() @ v_MKSD, lse_MKR


def _matmul_forward(q_MKRD, k_MKSD, v_MKSD, bias_M1RS, sinks_KR, scale):
    return _with_sinks(*_matmul(q_MKRD, k_MKSD, v_MKSD, bias_M1RS, scale), sinks_KR)


def _matmul_backward(do_MKRD, q_MKRD, k_MKSD, v_MKSD, o_MKRD, lse_MKR, bias_M1RS, scale):
    p_MKRS = (q_MKRD @ k_MKSD.mT).mul_(scale).add_(bias_M1RS).sub_(lse_MKR[..., None]).exp_()
    dv_MKSD = p_MKRS.mT @ do_MKRD
    dp_MKRS = do_MKRD @ v_MKSD.mT
    ds_MKRS = dp_MKRS.sub_((do_MKRD * o_MKRD).sum(-1, keepdim=True)).mul_(p_MKRS).mul_(scale)
    return ds_MKRS @ k_MKSD, ds_MKRS.mT @ q_MKRD, dv_MKSD


def _flash_cpu(q_MKRD, k_MKSD, v_MKSD, bias_M1RS, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_MKRD, k_MKSD, v_MKSD, 0.0, False, attn_mask=bias_M1RS, scale=scale
    )


def _flash_cpu_forward(q_MKRD, k_MKSD, v_MKSD, bias_M1RS, sinks_KR, scale):
    return _with_sinks(*_flash_cpu(q_MKRD, k_MKSD, v_MKSD, bias_M1RS, scale), sinks_KR)


def _flash_cpu_backward(do_MKRD, q_MKRD, k_MKSD, v_MKSD, o_MKRD, lse_MKR, bias_M1RS, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do_MKRD, q_MKRD, k_MKSD, v_MKSD, o_MKRD, lse_MKR, 0.0, False, attn_mask=bias_M1RS, scale=scale
    )


@functools.cache
def _compiled(function: Callable) -> Callable:
    # dynamic: a few kernels for tiles of all sizes
    return torch.compile(function, dynamic=True)


def _fused_forward(q_MKRD, k_MKSD, v_MKSD, bias_M1RS, sinks_KR, scale):
    p_MKRS, lse_MKR1 = _compiled(_probabilities)(q_MKRD @ k_MKSD.mT, bias_M1RS, sinks_KR[..., None], scale)
    return p_MKRS @ v_MKSD, lse_MKR1[..., 0]


def _fused_backward(do_MKRD, q_MKRD, k_MKSD, v_MKSD, o_MKRD, lse_MKR, bias_M1RS, scale):
    k_MKSD = k_MKSD.contiguous()  # Otherwise each of its two products would copy it.
    scores_MKRS, dp_MKRS = q_MKRD @ k_MKSD.mT, do_MKRD @ v_MKSD.mT
    p_MKRS, ds_MKRS = _compiled(_score_gradients)(
        scores_MKRS, dp_MKRS, bias_M1RS, lse_MKR[..., None], do_MKRD, o_MKRD, scale
    )
    return ds_MKRS @ k_MKSD, ds_MKRS.mT @ q_MKRD, p_MKRS.mT @ do_MKRD


# A bias read from memory beats comparing indices inside of these kernels (docs/log.md).
def _probabilities(scores, bias, sinks, scale: float):
    scaled = scores.float() * scale + bias
    highest = torch.maximum(scaled.amax(-1, keepdim=True), sinks)
    weights = torch.exp(scaled - highest)
    total = weights.sum(-1, keepdim=True) + torch.exp(sinks - highest)
    return (weights / total).to(scores.dtype), highest + torch.log(total)


def _score_gradients(scores, dp, bias, lse, do, o, scale: float):
    do_o = (do.float() * o.float()).sum(-1, keepdim=True)
    p = torch.exp(scores.float() * scale + bias - lse)
    return p.to(scores.dtype), (p * (dp.float() - do_o) * scale).to(scores.dtype)


_KERNELS = {
    "chunked": Kernel(_matmul_forward, _matmul_backward),
    "flash": Kernel(_flash_cpu_forward, _flash_cpu_backward),
    "fused": Kernel(_fused_forward, _fused_backward),
}
