"""The expert MLPs of a mixture of experts, for rows that are already sorted by expert.

    gate, up = deinterleave(x @ gate_up_proj[e] + gate_up_proj_bias[e])
    y        = act(gate, up) @ down_proj[e] + down_proj_bias[e]

Every back end computes this function and its gradients:

- ``loop``: one expert at a time under plain autograd. The reference; needs the row counts on the host.
- ``grouped_mm``: ``torch.nn.functional.grouped_mm``, two grouped GEMMs, and no host synchronisation of ours: for CUDA.
- ``blocked``: hand-written forward and backward for the CPU. Each expert's hidden states are computed *transposed*,
  ``h_Fn = W_DF^T x_nD^T``: BLAS transposes almost for free, and then the interleaved gate and up columns of ``h_nF``
  are the even and odd *rows* of ``h_Fn``. Every elementwise pass reads contiguous memory and vectorises, and neither
  weights nor activations are ever de-interleaved.

Shape legend: N rows (token copies) of all experts, n rows of one expert, E experts, D hidden size, I intermediate size,
F = 2 * I.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ACTIVATIONS = ("gpt_oss", "silu")
BACKENDS = ("auto", "loop", "grouped_mm", "blocked")

# Elements of gate (and of up) per elementwise pass on the CPU: enough to amortise the dispatch of an operation
# (microseconds), few enough that the scratch (4 MiB) stays in cache. Measured flat from 2^17 to 2^19.
_CHUNK_ELEMENTS = 1 << 18


class _Gating(NamedTuple):
    """``act = g * sigmoid(alpha * g) * u``; g = min(gate, limit), u = clip(up, -limit, limit) (+ 1 if ``plus_one``)."""

    alpha: float
    limit: float
    plus_one: bool


def _gating(activation: str, alpha: float, limit: float) -> _Gating:
    if activation == "gpt_oss":
        return _Gating(alpha, limit, plus_one=True)
    if activation == "silu":
        return _Gating(1.0, math.inf, plus_one=False)
    raise ValueError(f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")


def grouped_experts(
    x_ND: Tensor,
    tokens_per_expert_E: Tensor,
    gate_up_proj_EDF: Tensor,
    gate_up_proj_bias_EF: Tensor | None,
    down_proj_EID: Tensor,
    down_proj_bias_ED: Tensor | None,
    *,
    activation: str,
    alpha: float = 1.702,
    limit: float = 7.0,
    backend: str = "auto",
) -> Tensor:
    """Apply expert e's MLP to its ``tokens_per_expert_E[e]`` consecutive rows of ``x_ND``: ``y_ND``, in x's dtype.

    Args:
        x_ND: rows sorted by expert; ``tokens_per_expert_E`` (integers) must sum to N. Experts may have no rows: their
            gradients are exact zeros.
        gate_up_proj_EDF, down_proj_EID: weights in Hugging Face's layout, gate in the even and up in the odd columns.
        gate_up_proj_bias_EF, down_proj_bias_ED: biases, either may be None.
        activation: ``gpt_oss`` (clamped SwiGLU of the GPT-OSS reference, with ``alpha`` and ``limit``) or ``silu``
            (``silu(gate) * up``; ignores both).
        backend: see the module docstring. ``auto`` takes ``blocked`` on CPU, and elsewhere ``grouped_mm`` where its
            dtype and alignment limits allow, else ``loop``.

    In bf16 and fp16 each GEMM's result is rounded before its bias is added, as in the Hugging Face model: a fused
    addition is more exact, but moves pre-activations across the clamp. The activation is evaluated in fp32 and rounded
    once, save by ``loop``, which rounds after every operation.

    Raises:
        ValueError: unknown names, inconsistent shapes or dtypes, row counts that do not sum to N (``loop`` and
            ``blocked``; ``grouped_mm`` would have to wait for the device), or sizes ``grouped_mm`` cannot align.
    """
    _check_operands(x_ND, tokens_per_expert_E, gate_up_proj_EDF, gate_up_proj_bias_EF, down_proj_EID, down_proj_bias_ED)
    gating = _gating(activation, alpha, limit)
    if backend == "auto":
        if x_ND.device.type == "cpu":
            backend = "blocked"
        else:
            backend = "loop" if _grouped_mm_limit(x_ND, gate_up_proj_EDF) else "grouped_mm"
    operands = (x_ND, gate_up_proj_EDF, gate_up_proj_bias_EF, down_proj_EID, down_proj_bias_ED)
    if backend == "grouped_mm":
        return _grouped_mm(tokens_per_expert_E, gating, *operands)
    if backend not in ("loop", "blocked"):
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")

    return _one_by_one(backend, tokens_per_expert_E, gating, operands)


@torch.compiler.disable  # row counts on the host are what a compiler cannot trace; it breaks the graph here instead
def _one_by_one(backend: str, tokens_per_expert_E: Tensor, gating: "_Gating", operands: tuple) -> Tensor:
    counts, rows = tokens_per_expert_E.tolist(), operands[0].shape[0]
    if sum(counts) != rows:
        raise ValueError(f"tokens_per_expert sums to {sum(counts)} but x has {rows} rows; every row needs an expert")
    return _loop(counts, gating, *operands) if backend == "loop" else _Blocked.apply(counts, gating, *operands)


def swiglu(h: Tensor, activation: str, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """The experts' activation alone: ``[..., 2 * I]``, gate and up interleaved -> ``[..., I]`` in h's dtype, via fp32.

    Keeps only ``h`` for backward. A dense MLP that must be fast on CPU is better served by ``grouped_experts`` with one
    expert, whose GEMM delivers gate and up de-interleaved.
    """
    return _Swiglu.apply(h, _gating(activation, alpha, limit))


def _check_operands(x_ND, tokens_E, w1_EDF, b1_EF, w2_EID, b2_ED) -> None:
    E, D, twice_I = w1_EDF.shape
    expected = {
        "x": (x_ND, (x_ND.shape[0], D)),
        "gate_up_proj_bias": (b1_EF, (E, twice_I)),
        "down_proj": (w2_EID, (E, twice_I // 2, D)),
        "down_proj_bias": (b2_ED, (E, D)),
        "tokens_per_expert": (tokens_E, (E,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; gate_up_proj {tuple(w1_EDF.shape)} asks for {shape}"
            )
    for name, tensor in (
        ("gate_up_proj", w1_EDF),
        ("gate_up_proj_bias", b1_EF),
        ("down_proj", w2_EID),
        ("down_proj_bias", b2_ED),
    ):
        if tensor is not None and tensor.dtype != x_ND.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} but x is {x_ND.dtype}; cast the parameters to the compute dtype first"
            )


# ---------------------------------------------------------------------------------------------------------------- loop


def _swiglu_reference(h: Tensor, gating: _Gating) -> Tensor:
    """The activation as the papers write it, under plain autograd and in h's dtype."""
    gate = h[..., ::2].clamp(max=gating.limit)
    up = h[..., 1::2].clamp(min=-gating.limit, max=gating.limit)
    return (up + 1 if gating.plus_one else up) * (gate * torch.sigmoid(gate * gating.alpha))


def _loop(counts: list[int], gating: _Gating, x_ND, w1_EDF, b1_EF, w2_EID, b2_ED) -> Tensor:
    # unbind, not indexing: the backward of each w[e] would fill a whole [E, ...] gradient.
    none_E = (None,) * len(counts)
    biases = (none_E if b is None else b.unbind(0) for b in (b1_EF, b2_ED))
    y_parts = []
    for x_nD, w1_DF, w2_ID, b1_F, b2_D in zip(x_ND.split(counts), w1_EDF.unbind(0), w2_EID.unbind(0), *biases):
        h_nF = x_nD @ w1_DF if b1_F is None else x_nD @ w1_DF + b1_F
        a_nI = _swiglu_reference(h_nF, gating)
        y_parts.append(a_nI @ w2_ID if b2_D is None else a_nI @ w2_ID + b2_D)
    return torch.cat(y_parts)


# ---------------------------------------------------------------------------------------------------------- grouped_mm


def _grouped_mm_limit(x_ND: Tensor, w1_EDF: Tensor) -> str | None:
    """Why ``grouped_mm`` cannot serve these operands, or None."""
    if x_ND.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"grouped_mm computes in bfloat16, float16 or float32, not {x_ND.dtype}"
    D, twice_I = w1_EDF.shape[1:]
    multiple = 16 // x_ND.element_size()
    if D % multiple or twice_I // 2 % multiple:
        return (
            f"grouped_mm needs rows of whole 16 bytes: sizes in multiples of {multiple}, "
            f"not hidden {D} and intermediate {twice_I // 2}"
        )
    return None


def _grouped_mm(tokens_per_expert_E: Tensor, gating: _Gating, x_ND, w1_EDF, b1_EF, w2_EID, b2_ED) -> Tensor:
    if limit := _grouped_mm_limit(x_ND, w1_EDF):
        raise ValueError(f"{limit}; use backend='loop' or 'blocked'")
    tokens_E = tokens_per_expert_E.to(x_ND.device, torch.int32)
    offsets_E = tokens_E.cumsum(0, dtype=torch.int32)
    if b1_EF is None and b2_ED is None:
        expert_NE = None
    else:
        # One-hot rows turn the bias add, and its gradient, into one small GEMM each: no gather, no atomics.
        row_N1 = torch.arange(x_ND.shape[0], device=x_ND.device)[:, None]
        expert_NE = ((row_N1 < offsets_E) & (row_N1 >= offsets_E - tokens_E)).to(x_ND.dtype)

    def linear(rows, weight, bias):
        out = F.grouped_mm(rows.contiguous(), weight, offs=offsets_E)
        if out.requires_grad:
            out.register_hook(torch.Tensor.contiguous)  # its backward refuses the stride-0 gradient of a sum or mean
        return out if bias is None else torch.addmm(out, expert_NE, bias)

    a_NI = _Swiglu.apply(linear(x_ND, w1_EDF, b1_EF), gating)
    return linear(a_NI, w2_EID, b2_ED)


# ---------------------------------------------------------------------------------------------------------- elementwise


class _Scratch:
    """Four reusable buffers in the compute dtype (fp32, or fp64 for fp64 data), cut to the shape at hand."""

    def __init__(self, elements: int, like: Tensor):
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.buffers = torch.empty(4, elements, dtype=dtype, device=like.device).unbind(0)
        self.one = torch.ones((), dtype=dtype, device=like.device)

    def views(self, shape: torch.Size) -> list[Tensor]:
        return [buffer[: shape.numel()].view(shape) for buffer in self.buffers]


def _load(source: Tensor, low: float, high: float, scratch: Tensor) -> Tensor:
    """``source`` clamped, in the compute dtype, read-only: in ``scratch``, or ``source`` itself if that serves."""
    clamped = high < math.inf
    if source.dtype != scratch.dtype:
        scratch.copy_(source)
        return scratch.clamp_(low, high) if clamped else scratch
    return torch.clamp(source, low, high, out=scratch) if clamped else source


def _times_up(t: Tensor, u: Tensor, gating: _Gating, out: Tensor) -> Tensor:
    """``t * u``, or ``t * (u + 1)``, in one pass."""
    return torch.addcmul(t, t, u, out=out) if gating.plus_one else torch.mul(t, u, out=out)


def _gated(gate: Tensor, up: Tensor, gating: _Gating, scratch: _Scratch) -> tuple[Tensor, ...]:
    """``s = sigmoid(alpha * g)``, ``glu = g * s``, u, and a free buffer; g and u are the clamped gate and up."""
    g_buffer, s, u_buffer, free = scratch.views(gate.shape)
    g = _load(gate, -math.inf, gating.limit, g_buffer)
    u = _load(up, -gating.limit, gating.limit, u_buffer)
    s = torch.sigmoid(g, out=s) if gating.alpha == 1.0 else torch.mul(g, gating.alpha, out=s).sigmoid_()
    return s, torch.mul(g, s, out=g_buffer), u, free


def _activation_forward(gate: Tensor, up: Tensor, gating: _Gating, scratch: _Scratch, out: Tensor) -> None:
    _, glu, u, _ = _gated(gate, up, gating, scratch)
    _times_up(glu, u, gating, out)


def _activation_backward(
    gate: Tensor,
    up: Tensor,
    d_out: Tensor,
    gating: _Gating,
    scratch: _Scratch,
    out: Tensor | None,
    d_gate: Tensor,
    d_up: Tensor,
) -> None:
    """Gradients of the pre-activations, and the activation itself again in ``out`` (where given).

    d(g * s)/dg = s + alpha * g * s * (1 - s), written as an interpolation from ``alpha * g * s`` to 1 by s: one pass.
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
    return torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(math.inf, dtype=dtype)).item()


def _rows_per_chunk(rows: int, columns: int, device: torch.device) -> int:
    """Rows of a [rows, columns] block per elementwise pass; one pass where there is no cache worth blocking for."""
    return max(1, _CHUNK_ELEMENTS // max(columns, 1)) if device.type == "cpu" else max(rows, 1)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, gating: _Gating) -> Tensor:
        ctx.gating = gating
        ctx.save_for_backward(h)
        out = h.new_empty(*h.shape[:-1], h.shape[-1] // 2)
        h_2d, out_2d = h.reshape(-1, h.shape[-1]), out.view(-1, out.shape[-1])
        rows = _rows_per_chunk(*out_2d.shape, h.device)
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
        rows = _rows_per_chunk(*d_out_2d.shape, h.device)
        scratch = _Scratch(min(rows, d_out_2d.shape[0]) * d_out_2d.shape[1], h)
        for h_chunk, d_h_chunk, d_chunk in zip(h_2d.split(rows), d_h_2d.split(rows), d_out_2d.split(rows)):
            gate, up, d_gate, d_up = h_chunk[:, ::2], h_chunk[:, 1::2], d_h_chunk[:, ::2], d_h_chunk[:, 1::2]
            _activation_backward(gate, up, d_chunk, ctx.gating, scratch, None, d_gate, d_up)
        return d_h, None


# ------------------------------------------------------------------------------------------------------------- blocked


class _Blocked(torch.autograd.Function):
    """One expert at a time; every GEMM writes straight into its slice of the result, and experts share all scratch."""

    @staticmethod
    def forward(ctx, counts: list[int], gating: _Gating, x_ND, w1_EDF, b1_EF, w2_EID, b2_ED) -> Tensor:
        N, twice_I, most = x_ND.shape[0], w1_EDF.shape[2], max(counts, default=0)
        keep = any(ctx.needs_input_grad)
        # Blocks [F, n] of the experts one after the other; without a backward one block is enough.
        h_flat = x_ND.new_empty((N if keep else most) * twice_I)
        a_flat = x_ND.new_empty(most * twice_I // 2)
        y_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        scratch = _Scratch(_scratch_elements(most, twice_I // 2), x_ND)
        start = 0
        for e, n in enumerate(counts):
            if n == 0:
                continue
            h_Fn = h_flat[start * twice_I if keep else 0 :][: n * twice_I].view(twice_I, n)
            a_In = a_flat[: n * twice_I // 2].view(-1, n)
            rows = slice(start, start + n)
            torch.mm(w1_EDF[e].t(), x_ND[rows].t(), out=h_Fn)
            step = _rows_per_chunk(*a_In.shape, x_ND.device)
            h_I2n, b1_I2 = h_Fn.view(-1, 2, n), None if b1_EF is None else b1_EF[e].view(-1, 2)
            for i in range(0, a_In.shape[0], step):
                h = h_I2n[i : i + step]
                if b1_I2 is not None:  # here, near the cache: cheaper than addmm, which first broadcasts it to memory
                    h.add_(b1_I2[i : i + step, :, None])
                _activation_forward(h[:, 0], h[:, 1], gating, scratch, a_In[i : i + step])
            torch.mm(a_In.t(), w2_EID[e], out=y_ND[rows])
            if b2_ED is not None:
                y_ND[rows].add_(b2_ED[e])
            start += n
        ctx.counts, ctx.gating = counts, gating
        ctx.save_for_backward(x_ND, h_flat if keep else None, w1_EDF, w2_EID)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_ND: Tensor):
        x_ND, h_flat, w1_EDF, w2_EID = ctx.saved_tensors
        _, _, need_x, need_w1, need_b1, need_w2, need_b2 = ctx.needs_input_grad
        (E, D, twice_I), most = w1_EDF.shape, max(ctx.counts, default=0)

        def gradient(needed: bool, *shape: int) -> Tensor | None:
            return dy_ND.new_empty(shape) if needed else None

        dx_ND = gradient(need_x, *x_ND.shape)
        dw1_EDF, db1_EF = gradient(need_w1, E, D, twice_I), gradient(need_b1, E, twice_I)
        dw2_EID, db2_ED = gradient(need_w2, E, twice_I // 2, D), gradient(need_b2, E, D)
        need_h = need_x or need_w1 or need_b1
        a_flat, da_flat, dh_flat = (dy_ND.new_empty(most * width) for width in (twice_I // 2, twice_I // 2, twice_I))
        scratch = _Scratch(_scratch_elements(most, twice_I // 2), x_ND)
        start = 0
        for e, n in enumerate(ctx.counts):
            if n == 0:
                for grad in (dw1_EDF, db1_EF, dw2_EID, db2_ED):
                    if grad is not None:
                        grad[e].zero_()
                continue
            rows = slice(start, start + n)
            x_nD, dy_nD = x_ND[rows], dy_ND[rows]
            h_Fn = h_flat[start * twice_I :][: n * twice_I].view(twice_I, n)
            dh_Fn = dh_flat[: n * twice_I].view(twice_I, n)
            a_In, da_In = (flat[: n * twice_I // 2].view(-1, n) for flat in (a_flat, da_flat))
            start += n

            if need_h or need_w2:
                torch.mm(w2_EID[e], dy_nD.t(), out=da_In)
                step = _rows_per_chunk(*a_In.shape, x_ND.device)
                chunks = zip(
                    h_Fn.view(-1, 2, n).split(step),
                    dh_Fn.view(-1, 2, n).split(step),
                    a_In.split(step),
                    da_In.split(step),
                )
                for h, dh, a, da in chunks:
                    gating = _without_idle_clamp(ctx.gating, h)
                    _activation_backward(h[:, 0], h[:, 1], da, gating, scratch, a, dh[:, 0], dh[:, 1])
            if need_w2:
                torch.mm(a_In, dy_nD, out=dw2_EID[e])
            if need_b2:
                torch.sum(dy_nD, 0, out=db2_ED[e])
            if need_w1:
                torch.mm(x_nD.t(), dh_Fn.t(), out=dw1_EDF[e])
            if need_b1:
                torch.sum(dh_Fn, 1, out=db1_EF[e])
            if need_x:
                torch.mm(dh_Fn.t(), w1_EDF[e].t(), out=dx_ND[rows])
        return None, None, dx_ND, dw1_EDF, db1_EF, dw2_EID, db2_ED


def _without_idle_clamp(gating: _Gating, h: Tensor) -> _Gating:
    """Clamps and their gradient masks are four passes; one look at ``h`` saves them where nothing exceeds the limit."""
    if gating.limit == math.inf or h.device.type != "cpu":
        return gating
    low, high = torch.aminmax(h)
    return gating._replace(limit=math.inf) if max(-low.item(), high.item()) <= gating.limit else gating


def _scratch_elements(most_rows: int, intermediate: int) -> int:
    """Enough for the largest chunk: up to _CHUNK_ELEMENTS, or one row of the transposed block where that is longer."""
    return min(max(_CHUNK_ELEMENTS, most_rows), most_rows * intermediate)
