"""The gated activation of the experts: clamped SwiGLU (GPT-OSS, arXiv:2508.10925) or plain SwiGLU (arXiv:2002.05202).

    act = g * sigmoid(alpha * g) * (u + 1),   g = min(gate, limit), u = clip(up, -limit, limit)

`swiglu` is the function on interleaved hidden states, for any device. `BetweenGemms` does everything between the
matrix products of the hand-written expert MLP (`cpu_blocked.py`), on transposed blocks `h_I2n` whose gate and up rows
are contiguous, in passes over chunks that stay in cache.

Shapes: I intermediate size, n rows of one expert, F = 2 * I.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ACTIVATIONS = ("gpt_oss", "silu")

# Elements of gate (and of up) per elementwise pass on the CPU: enough to amortise the dispatch of an operation
# (microseconds), few enough that the scratch (4 MiB) stays in cache. Measured flat from 2^17 to 2^19.
_CHUNK_ELEMENTS = 1 << 18


class Gating(NamedTuple):
    """act = g * sigmoid(alpha * g) * u, with g = min(gate, limit), u = clip(up, -limit, limit), + 1 if `plus_one`."""

    alpha: float
    limit: float
    plus_one: bool


def gating_of(activation: str, alpha: float, limit: float) -> Gating:
    """Return the settings of a named activation.

    Raises:
        ValueError: There is no activation of that name.
    """
    if activation == "gpt_oss":
        return Gating(alpha, limit, plus_one=True)
    if activation == "silu":
        return Gating(1.0, math.inf, plus_one=False)
    raise ValueError(f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")


def swiglu(h: Tensor, activation: str, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """Return the experts' activation alone, [..., I] in h's dtype, computed in fp32.

    It keeps only h for the backward pass, unless torch.compile decides otherwise. A dense MLP that must be fast on CPU
    is better served by `grouped_experts` with one expert, whose matrix product delivers gate and up de-interleaved.

    Args:
        h: [..., 2 * I], gate and up interleaved.
        activation: One of `ACTIVATIONS`.
        alpha: Factor within the sigmoid; `silu` ignores it.
        limit: Where gate and up are clamped; `silu` ignores it.
    """
    return gated(h, gating_of(activation, alpha, limit))


def gated(h: Tensor, gating: Gating) -> Tensor:
    """Return `swiglu` of h, with its settings already looked up."""
    if torch.compiler.is_compiling():  # the compiler fuses the formula, and dislikes `out=`
        dtype = torch.promote_types(h.dtype, torch.float32)
        return swiglu_reference(h.to(dtype), gating).to(h.dtype)
    return _Swiglu.apply(h, gating)


def swiglu_reference(h: Tensor, gating: Gating) -> Tensor:
    """Return the activation as the papers write it, under plain autograd and in h's dtype."""
    gate = h[..., ::2].clamp(max=gating.limit)
    up = h[..., 1::2].clamp(min=-gating.limit, max=gating.limit)
    return (up + 1 if gating.plus_one else up) * (gate * torch.sigmoid(gate * gating.alpha))


# ----------------------------------------------------------------------------------------------- between two GEMMs


class BetweenGemms:
    """What an expert computes between its matrix products, with room for experts of up to `most_rows` rows."""

    def __init__(self, gating: Gating, most_rows: int, intermediate: int, like: Tensor) -> None:
        self.gating = gating
        # Enough for the largest chunk: up to _CHUNK_ELEMENTS, or one row of the transposed block where that is longer.
        self.scratch = _Scratch(min(max(_CHUNK_ELEMENTS, most_rows), most_rows * intermediate), like)

    def forward(self, h_I2n: Tensor, b1_I2: Tensor | None, a_In: Tensor) -> None:
        """Add the bias (or None) to the pre-activations h, in place, and fill a."""
        step = _rows_per_chunk(a_In)
        for i in range(0, a_In.shape[0], step):
            h = h_I2n[i : i + step]
            if b1_I2 is not None:  # here, near the cache: cheaper than addmm, which first broadcasts it to memory
                h.add_(b1_I2[i : i + step, :, None])
            _activation_forward(h[:, 0], h[:, 1], self.gating, self.scratch, a_In[i : i + step])

    def backward(self, h_I2n: Tensor, da_In: Tensor, a_In: Tensor, dh_I2n: Tensor, db1_I2: Tensor | None) -> None:
        """Fill a again, dh, and db1 (or None) from h and da."""
        step = _rows_per_chunk(a_In)
        for h, da, a, dh in zip(h_I2n.split(step), da_In.split(step), a_In.split(step), dh_I2n.split(step)):
            gating = _without_idle_clamp(self.gating, h)
            _activation_backward(h[:, 0], h[:, 1], da, gating, self.scratch, a, dh[:, 0], dh[:, 1])
        if db1_I2 is not None:
            torch.sum(dh_I2n, -1, out=db1_I2)


class _Scratch:
    """Four reusable buffers in the compute dtype (fp32, or fp64 for fp64 data), cut to the shape at hand."""

    def __init__(self, elements: int, like: Tensor):
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.buffers = torch.empty(4, elements, dtype=dtype, device=like.device).unbind(0)
        self.one = torch.ones((), dtype=dtype, device=like.device)

    def views(self, shape: torch.Size) -> list[Tensor]:
        return [buffer[: shape.numel()].view(shape) for buffer in self.buffers]


def _load(source: Tensor, low: float, high: float, scratch: Tensor) -> Tensor:
    """Return source clamped, in the compute dtype, read-only: in scratch, or source itself if that serves."""
    clamped = high < math.inf
    if source.dtype != scratch.dtype:
        scratch.copy_(source)
        return scratch.clamp_(low, high) if clamped else scratch
    return torch.clamp(source, low, high, out=scratch) if clamped else source


def _times_up(t: Tensor, u: Tensor, gating: Gating, out: Tensor) -> Tensor:
    """Compute t * u, or t * (u + 1), in one pass."""
    return torch.addcmul(t, t, u, out=out) if gating.plus_one else torch.mul(t, u, out=out)


def _gated(gate: Tensor, up: Tensor, gating: Gating, scratch: _Scratch) -> tuple[Tensor, ...]:
    """Return s = sigmoid(alpha * g), glu = g * s, u, and a free buffer; g and u are the clamped gate and up."""
    g_buffer, s, u_buffer, free = scratch.views(gate.shape)
    g = _load(gate, -math.inf, gating.limit, g_buffer)
    u = _load(up, -gating.limit, gating.limit, u_buffer)
    s = torch.sigmoid(g, out=s) if gating.alpha == 1.0 else torch.mul(g, gating.alpha, out=s).sigmoid_()
    return s, torch.mul(g, s, out=g_buffer), u, free


def _activation_forward(gate: Tensor, up: Tensor, gating: Gating, scratch: _Scratch, out: Tensor) -> None:
    _, glu, u, _ = _gated(gate, up, gating, scratch)
    _times_up(glu, u, gating, out)


def _activation_backward(
    gate: Tensor,
    up: Tensor,
    d_out: Tensor,
    gating: Gating,
    scratch: _Scratch,
    out: Tensor | None,
    d_gate: Tensor,
    d_up: Tensor,
) -> None:
    """Fill the gradients of the pre-activations, and `out` (if given) with the activation itself again.

    d(g * s)/dg = s + alpha * g * s * (1 - s) is written as an interpolation from alpha * g * s to 1 by s: one pass.
    """
    s, glu, u, free = _gated(gate, up, gating, scratch)
    if out is not None:
        _times_up(glu, u, gating, out)
    d = _load(d_out, -math.inf, math.inf, free)
    torch.mul(d, glu, out=d_up)
    d_glu = torch.lerp(glu if gating.alpha == 1.0 else glu.mul_(gating.alpha), scratch.one, s, out=s)
    torch.mul(_times_up(d, u, gating, glu), d_glu, out=d_gate)
    if gating.limit < math.inf:
        # clamp passes the gradient at the limit itself, hardtanh_backward does not: its bounds lie one step further.
        beyond = _next_above(gating.limit, s.dtype)
        torch.ops.aten.hardtanh_backward.grad_input(d_up, up, -beyond, beyond, grad_input=d_up)
        torch.ops.aten.hardtanh_backward.grad_input(d_gate, gate, -math.inf, beyond, grad_input=d_gate)


def _next_above(value: float, dtype: torch.dtype) -> float:
    kind = np.float64 if dtype == torch.float64 else np.float32  # numpy: no tensor, so nothing to read back
    return float(np.nextafter(kind(value), kind(math.inf)))


def _rows_per_chunk(block: Tensor) -> int:
    """Return how many rows of a 2D block one elementwise pass takes: all where there is no cache to block for."""
    rows, columns = block.shape
    return max(1, _CHUNK_ELEMENTS // max(columns, 1)) if block.device.type == "cpu" else max(rows, 1)


def _without_idle_clamp(gating: Gating, h: Tensor) -> Gating:
    """Drop the limit if nothing in h exceeds it: clamps and their gradient masks are four passes, this look is one."""
    if gating.limit == math.inf or h.device.type != "cpu":
        return gating
    low, high = torch.aminmax(h)
    return gating._replace(limit=math.inf) if max(-low.item(), high.item()) <= gating.limit else gating


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, gating: Gating) -> Tensor:
        ctx.gating = gating
        ctx.save_for_backward(h)
        out = h.new_empty(*h.shape[:-1], h.shape[-1] // 2)
        h_2d, out_2d = h.reshape(-1, h.shape[-1]), out.view(-1, out.shape[-1])
        rows = _rows_per_chunk(out_2d)
        scratch = _Scratch(min(rows, out_2d.shape[0]) * out_2d.shape[1], h)
        for h_chunk, out_chunk in zip(h_2d.split(rows), out_2d.split(rows)):
            _activation_forward(h_chunk[:, ::2], h_chunk[:, 1::2], gating, scratch, out_chunk)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        (h,) = ctx.saved_tensors
        d_h = torch.empty_like(h, memory_format=torch.contiguous_format)
        h_2d, d_h_2d = h.reshape(-1, h.shape[-1]), d_h.view(-1, h.shape[-1])
        d_out_2d = d_out.reshape(-1, d_out.shape[-1])
        rows = _rows_per_chunk(d_out_2d)
        scratch = _Scratch(min(rows, d_out_2d.shape[0]) * d_out_2d.shape[1], h)
        for h_chunk, d_h_chunk, d_chunk in zip(h_2d.split(rows), d_h_2d.split(rows), d_out_2d.split(rows)):
            gate, up, d_gate, d_up = h_chunk[:, ::2], h_chunk[:, 1::2], d_h_chunk[:, ::2], d_h_chunk[:, 1::2]
            _activation_backward(gate, up, d_chunk, ctx.gating, scratch, None, d_gate, d_up)
        return d_h, None
