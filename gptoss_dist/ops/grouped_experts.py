"""The expert MLPs of a mixture of experts, for rows that are already sorted by expert.

    gate, up = deinterleave(x @ gate_up_proj[e] + gate_up_proj_bias[e])
    y        = act(gate, up) @ down_proj[e] + down_proj_bias[e]

Every back end computes this function and its gradients:

- ``loop``: one expert at a time under plain autograd. The reference; needs the row counts on the host.
- ``grouped_mm``: ``torch.nn.functional.grouped_mm``, two grouped GEMMs, and no host synchronisation of ours: for CUDA.
- ``grouped_gemm``: the same with the GEMMs of the package of that name (https://github.com/tgale96/grouped_gemm), for
  bf16 on CUDA. Opt-in: it reads the row counts on the host, once per call.
- ``blocked``: hand-written forward and backward for the CPU. Each expert's hidden states are computed *transposed*,
  ``h_Fn = W_DF^T x_nD^T``: BLAS transposes almost for free, and then the interleaved gate and up columns of ``h_nF``
  are the even and odd *rows* of ``h_Fn``. Every elementwise pass reads contiguous memory and vectorises, and neither
  weights nor activations are ever de-interleaved. Where bf16 is multiplied in fp32 (``ops/gemm.py``), rows and weights
  are cast once per pass, and what lives only between two GEMMs is not rounded.

Shape legend: N rows (token copies) of all experts, n rows of one expert, E experts, D hidden size, I intermediate size,
F = 2 * I.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptoss_dist.ops.gated_activation import BetweenGemms, Gating, gated, gating_of, swiglu_reference
from gptoss_dist.ops.gemm import cast_into, gemm_dtype, mm_into

BACKENDS = ("auto", "loop", "grouped_mm", "grouped_gemm", "blocked")


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
        ValueError: unknown names, inconsistent shapes or dtypes, row counts that do not sum to N (save with
            ``grouped_mm``, which would have to wait for the device), sizes ``grouped_mm`` cannot align, a dtype other
            than bf16 for ``grouped_gemm``, or its package cannot be imported.
    """
    _check_operands(x_ND, tokens_per_expert_E, gate_up_proj_EDF, gate_up_proj_bias_EF, down_proj_EID, down_proj_bias_ED)
    gating = gating_of(activation, alpha, limit)
    if backend == "auto":
        if x_ND.device.type == "cpu":
            backend = "blocked"
        else:
            backend = "loop" if grouped_mm_limit(x_ND.dtype, *down_proj_EID.shape[1:]) else "grouped_mm"
    operands = (x_ND, gate_up_proj_EDF, gate_up_proj_bias_EF, down_proj_EID, down_proj_bias_ED)
    if backend == "grouped_mm":
        # The compiler's idea of torch's grouped product knows bf16 only: for other types the graph breaks here.
        multiply = _grouped_mm if x_ND.dtype == torch.bfloat16 else _grouped_mm_uncompiled
        return multiply(tokens_per_expert_E, gating, operands)
    if backend == "grouped_gemm":
        return _grouped_gemm(tokens_per_expert_E, gating, operands)
    if backend not in ("loop", "blocked"):
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")

    return _one_by_one(backend, tokens_per_expert_E, gating, operands)


@torch.compiler.disable  # row counts on the host are what a compiler cannot trace; it breaks the graph here instead
def _one_by_one(backend: str, tokens_per_expert_E: Tensor, gating: Gating, operands: tuple) -> Tensor:
    counts = tokens_per_expert_E.tolist()
    _check_counts(counts, operands[0])
    if backend == "loop":
        return _loop(counts, gating, *operands)
    dtype = gemm_dtype(operands[0], rows=sum(counts) // max(sum(n > 0 for n in counts), 1))
    room = _in_few_sizes(counts) if _builds_a_kernel_per_shape(operands[0].device, dtype) else counts
    if room == counts:
        return _Blocked.apply(counts, gating, dtype, *operands)
    position_N = _positions(counts, room)
    y_PD = _Blocked.apply(room, gating, dtype, _Spread.apply(operands[0], sum(room), position_N), *operands[1:])
    return _Compact.apply(y_PD, position_N)


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


def _check_counts(counts: list[int], x_ND: Tensor) -> None:
    if sum(counts) != x_ND.shape[0]:
        raise ValueError(
            f"tokens_per_expert sums to {sum(counts)} but x has {x_ND.shape[0]} rows; every row needs an expert"
        )


# ---------------------------------------------------------------------------------------------------------------- loop


def _loop(counts: list[int], gating: Gating, x_ND, w1_EDF, b1_EF, w2_EID, b2_ED) -> Tensor:
    # unbind, not indexing: the backward of each w[e] would fill a whole [E, ...] gradient.
    none_E = (None,) * len(counts)
    biases = (none_E if b is None else b.unbind(0) for b in (b1_EF, b2_ED))
    y_parts = []
    for x_nD, w1_DF, w2_ID, b1_F, b2_D in zip(x_ND.split(counts), w1_EDF.unbind(0), w2_EID.unbind(0), *biases):
        h_nF = x_nD @ w1_DF if b1_F is None else x_nD @ w1_DF + b1_F
        a_nI = swiglu_reference(h_nF, gating)
        y_parts.append(a_nI @ w2_ID if b2_D is None else a_nI @ w2_ID + b2_D)
    return torch.cat(y_parts)


# ------------------------------------------------------------------------------------------- grouped_mm, grouped_gemm


def grouped_mm_limit(dtype: torch.dtype, I: int, D: int) -> str | None:  # noqa: E741
    """Why ``grouped_mm`` cannot serve operands of this type and these sizes, or None."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"grouped_mm computes in bfloat16, float16 or float32, not {dtype}"
    multiple = 16 // dtype.itemsize
    if D % multiple or I % multiple:
        return (
            f"grouped_mm needs rows of whole 16 bytes: sizes in multiples of {multiple}, "
            f"not hidden {D} and intermediate {I}"
        )
    return None


def _grouped_mm(tokens_per_expert_E: Tensor, gating: Gating, operands: tuple) -> Tensor:
    if limit := grouped_mm_limit(operands[0].dtype, *operands[3].shape[1:]):
        raise ValueError(f"{limit}; use backend='loop' or 'blocked'")

    def multiply(rows, weight, offsets_E):
        out = F.grouped_mm(rows, weight, offs=offsets_E)
        if out.requires_grad:
            out.register_hook(torch.Tensor.contiguous)  # its backward refuses the stride-0 gradient of a sum or mean
        return out

    return _in_two_multiplications(multiply, tokens_per_expert_E, gating, *operands)


_grouped_mm_uncompiled = torch.compiler.disable(_grouped_mm)


@torch.compiler.disable  # as `_one_by_one`
def _grouped_gemm(tokens_per_expert_E: Tensor, gating: Gating, operands: tuple) -> Tensor:
    if operands[0].dtype != torch.bfloat16:
        raise ValueError(
            f"backend='grouped_gemm' computes in bfloat16 only, not {operands[0].dtype}; use backend='grouped_mm'"
        )
    try:
        from grouped_gemm import ops
    except ImportError as error:
        raise ValueError(
            f"backend='grouped_gemm' needs the package grouped_gemm, which cannot be imported ({error}); use "
            "backend='grouped_mm', or, with a CUDA toolkit, pip install --no-build-isolation grouped_gemm==0.3.0"
        ) from error
    counts_E = tokens_per_expert_E.to("cpu", torch.int64)  # the one wait for the device; the package wants them there
    _check_counts(counts_E.tolist(), operands[0])  # it would read and write out of bounds

    def multiply(rows, weight, offsets_E):
        return ops.gmm(rows, weight.contiguous(), counts_E)

    return _in_two_multiplications(multiply, tokens_per_expert_E, gating, *operands)


def _in_two_multiplications(
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor],
    tokens_per_expert_E: Tensor,
    gating: Gating,
    x_ND,
    w1_EDF,
    b1_EF,
    w2_EID,
    b2_ED,
) -> Tensor:
    """``multiply(rows, weight, offsets_E)``: contiguous rows times the matrix of their expert; expert e's rows end
    before ``offsets_E[e]``."""
    tokens_E = tokens_per_expert_E.to(x_ND.device, torch.int32)
    offsets_E = tokens_E.cumsum(0, dtype=torch.int32)
    if b1_EF is None and b2_ED is None:
        expert_NE = None
    else:
        # One-hot rows turn the bias add, and its gradient, into one small GEMM each: no gather, no atomics.
        row_N1 = torch.arange(x_ND.shape[0], device=x_ND.device)[:, None]
        expert_NE = ((row_N1 < offsets_E) & (row_N1 >= offsets_E - tokens_E)).to(x_ND.dtype)

    def linear(rows, weight, bias):
        out = multiply(rows.contiguous(), weight, offsets_E)
        return out if bias is None else torch.addmm(out, expert_NE, bias)

    a_NI = gated(linear(x_ND, w1_EDF, b1_EF), gating)
    return linear(a_NI, w2_EID, b2_ED)


# ------------------------------------------------------------------------------------------------------------- blocked


def _builds_a_kernel_per_shape(device: torch.device, dtype: torch.dtype) -> bool:
    """16-bit GEMMs on CPU are oneDNN's: it generates code at the first use of every shape, which costs as much as the
    GEMM of a few hundred rows (docs/log.md) - and an expert has another number of rows in every step."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def _in_few_sizes(counts: list[int]) -> list[int]:
    """Rows of room for each expert: at most a sixteenth more, one of 16 numbers per power of two."""
    steps = [1 << max(n.bit_length() - 5, 0) for n in counts]
    return [-(-n // step) * step for n, step in zip(counts, steps)]


def _positions(counts: list[int], room: list[int]) -> Tensor:
    """Where each row lies if every expert's rows begin a room of their own."""
    gap_E = torch.tensor([0, *(r - n for r, n in zip(room, counts))])[:-1].cumsum(0)
    return torch.arange(sum(counts)) + torch.repeat_interleave(gap_E, torch.tensor(counts))


class _Spread(torch.autograd.Function):
    """Rows to their positions among P, zeros between them."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, P: int, position_N: Tensor) -> Tensor:
        ctx.position_N = position_N
        return x_ND.new_zeros(P, x_ND.shape[1]).index_copy_(0, position_N, x_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_PD: Tensor):
        return dy_PD.index_select(0, ctx.position_N), None, None


class _Compact(torch.autograd.Function):
    """The inverse of `_Spread`. The zeros in its gradient keep the rows between out of the weights' gradients."""

    @staticmethod
    def forward(ctx, y_PD: Tensor, position_N: Tensor) -> Tensor:
        ctx.position_N, ctx.P = position_N, y_PD.shape[0]
        return y_PD.index_select(0, position_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_ND: Tensor):
        return dy_ND.new_zeros(ctx.P, dy_ND.shape[1]).index_copy_(0, ctx.position_N, dy_ND), None


def _cast_rooms(like: Tensor, dtype: torch.dtype, *elements: int) -> list[Tensor]:
    """Flat scratch in ``dtype`` for casts of ``like``'s dtype, empty if there is nothing to cast."""
    return [like.new_empty(n if dtype != like.dtype else 0, dtype=dtype) for n in elements]


class _Blocked(torch.autograd.Function):
    """One expert at a time; every GEMM writes straight into its slice of the result, and experts share all scratch.

    ``dtype`` is that of the GEMMs. If it is not the operands', there is scratch for casts of weights and results too.
    """

    @staticmethod
    def forward(
        ctx, counts: list[int], gating: Gating, dtype: torch.dtype, x_ND, w1_EDF, b1_EF, w2_EID, b2_ED
    ) -> Tensor:
        ctx.counts, ctx.gating, ctx.dtype = counts, gating, dtype
        (_, D, twice_I), N, most = w1_EDF.shape, x_ND.shape[0], max(counts, default=0)
        keep = any(ctx.needs_input_grad)
        w1_room, w2_room, room = _cast_rooms(x_ND, dtype, D * twice_I, D * twice_I // 2, most * max(D, twice_I))
        xc_ND = x_ND.to(dtype)
        # Blocks [F, n] of the experts one after the other; without a backward one block is enough.
        h_flat = x_ND.new_empty((N if keep else most) * twice_I)
        a_flat = x_ND.new_empty(most * twice_I // 2, dtype=dtype)
        y_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        between = BetweenGemms(gating, most, twice_I // 2, x_ND)
        start = 0
        for e, n in enumerate(counts):
            if n == 0:
                continue
            h_Fn = h_flat[start * twice_I if keep else 0 :][: n * twice_I].view(twice_I, n)
            a_In = a_flat[: n * twice_I // 2].view(-1, n)
            rows = slice(start, start + n)
            mm_into(cast_into(w1_EDF[e], w1_room).t(), xc_ND[rows].t(), h_Fn, room)
            between.forward(h_Fn.view(-1, 2, n), None if b1_EF is None else b1_EF[e].view(-1, 2), a_In)
            mm_into(a_In.t(), cast_into(w2_EID[e], w2_room), y_ND[rows], room)
            if b2_ED is not None:
                y_ND[rows].add_(b2_ED[e])
            start += n
        ctx.save_for_backward(x_ND, h_flat if keep else None, w1_EDF, w2_EID)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_ND: Tensor):
        x_ND, h_flat, w1_EDF, w2_EID = ctx.saved_tensors
        _, _, _, need_x, need_w1, need_b1, need_w2, need_b2 = ctx.needs_input_grad
        (E, D, twice_I), most, dtype = w1_EDF.shape, max(ctx.counts, default=0), ctx.dtype

        def gradient(needed: bool, *shape: int) -> Tensor | None:
            return dy_ND.new_empty(shape) if needed else None

        dx_ND = gradient(need_x, *x_ND.shape)
        dw1_EDF, db1_EF = gradient(need_w1, E, D, twice_I), gradient(need_b1, E, twice_I)
        dw2_EID, db2_ED = gradient(need_w2, E, twice_I // 2, D), gradient(need_b2, E, D)
        need_h = need_x or need_w1 or need_b1
        widths = (twice_I // 2, twice_I // 2, twice_I)
        a_flat, da_flat, dh_flat = (dy_ND.new_empty(most * width, dtype=dtype) for width in widths)
        w1_room, w2_room, room = _cast_rooms(x_ND, dtype, D * twice_I, D * twice_I // 2, max(D * twice_I, most * D))
        xc_ND, dyc_ND = x_ND.to(dtype) if need_w1 else None, dy_ND.to(dtype)
        between = BetweenGemms(ctx.gating, most, twice_I // 2, x_ND)
        start = 0
        for e, n in enumerate(ctx.counts):
            if n == 0:
                for grad in (dw1_EDF, db1_EF, dw2_EID, db2_ED):
                    if grad is not None:
                        grad[e].zero_()
                continue
            rows = slice(start, start + n)
            dy_nD = dyc_ND[rows]
            h_Fn = h_flat[start * twice_I :][: n * twice_I].view(twice_I, n)
            dh_Fn = dh_flat[: n * twice_I].view(twice_I, n)
            a_In, da_In = (flat[: n * twice_I // 2].view(-1, n) for flat in (a_flat, da_flat))
            start += n

            if need_h or need_w2:
                mm_into(cast_into(w2_EID[e], w2_room), dy_nD.t(), da_In, room)
                db1_I2 = db1_EF[e].view(-1, 2) if need_b1 else None
                between.backward(h_Fn.view(-1, 2, n), da_In, a_In, dh_Fn.view(-1, 2, n), db1_I2)
            if need_w2:
                mm_into(a_In, dy_nD, dw2_EID[e], room)
            if need_b2:
                torch.sum(dy_ND[rows], 0, out=db2_ED[e])
            if need_w1:
                mm_into(xc_ND[rows].t(), dh_Fn.t(), dw1_EDF[e], room)
            if need_x:
                mm_into(dh_Fn.t(), cast_into(w1_EDF[e], w1_room).t(), dx_ND[rows], room)
        return None, None, None, dx_ND, dw1_EDF, db1_EF, dw2_EID, db2_ED
