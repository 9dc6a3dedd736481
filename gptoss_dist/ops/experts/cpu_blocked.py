"""The expert MLPs on CPU, with a hand-written forward and backward pass.

Each expert's hidden states are computed *transposed*, `h_Fn = W_DF^T x_nD^T`: BLAS transposes almost for free, and then
the interleaved gate and up columns of `h_nF` are the even and odd *rows* of `h_Fn`. Every elementwise pass reads
contiguous memory and vectorises, and neither weights nor activations are ever de-interleaved. Where bf16 is multiplied
in fp32 (`ops/gemm.py`), rows and weights are cast once per pass, and what lives only between two matrix products is not
rounded.

Shapes: N rows of all experts, P of them and the room between, n rows of one expert, E experts, D hidden size,
I intermediate size, F = 2 * I.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptoss_dist.ops.experts.activation import BetweenGemms, Gating
from gptoss_dist.ops.experts.loop import check_counts
from gptoss_dist.ops.gemm import cast_into, gemm_dtype, mm_into


@torch.compiler.disable  # row counts on the host are what a compiler cannot trace; it breaks the graph here instead
def blocked_experts(tokens_per_expert_E: Tensor, gating: Gating, operands: tuple) -> Tensor:
    """Compute the expert MLPs by hand-written passes; arguments as in the table of `grouped_experts.py`."""
    x_ND, *weights = operands
    counts = tokens_per_expert_E.tolist()
    check_counts(counts, x_ND)
    dtype = gemm_dtype(x_ND, rows=sum(counts) // max(sum(n > 0 for n in counts), 1))
    room = in_few_sizes(counts) if builds_a_kernel_per_shape(x_ND.device, dtype) else counts
    if room == counts:
        return _Blocked.apply(counts, gating, dtype, x_ND, *weights)
    position_N = positions(counts, room)
    y_PD = _Blocked.apply(room, gating, dtype, _Pad.apply(x_ND, sum(room), position_N), *weights)
    return _Unpad.apply(y_PD, position_N)


def builds_a_kernel_per_shape(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether matrix products of this type are oneDNN's, as those in 16 bits on CPU are.

    It generates code at the first use of every shape, which costs as much as the product of a few hundred rows
    (docs/log.md), and an expert has another number of rows in every step.
    """
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def in_few_sizes(counts: list[int]) -> list[int]:
    """Return the rows of room for each expert: at most a sixteenth more, one of 16 numbers per power of two."""
    steps = [1 << max(n.bit_length() - 5, 0) for n in counts]
    return [-(-n // step) * step for n, step in zip(counts, steps)]


def positions(counts: list[int], room: list[int]) -> Tensor:
    """Return where each row lies if every expert's rows begin a room of their own, [N] int64."""
    gap_E = torch.tensor([0, *(r - n for r, n in zip(room, counts))])[:-1].cumsum(0)
    return torch.arange(sum(counts)) + torch.repeat_interleave(gap_E, torch.tensor(counts))


class _Pad(torch.autograd.Function):
    """Move rows to their positions among P, with zeros between them."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, P: int, position_N: Tensor) -> Tensor:
        ctx.position_N = position_N
        return x_ND.new_zeros(P, x_ND.shape[1]).index_copy_(0, position_N, x_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_PD: Tensor):
        return dy_PD.index_select(0, ctx.position_N), None, None


class _Unpad(torch.autograd.Function):
    """Undo `_Pad`. The zeros in its gradient keep the rows between out of the weights' gradients."""

    @staticmethod
    def forward(ctx, y_PD: Tensor, position_N: Tensor) -> Tensor:
        ctx.position_N, ctx.P = position_N, y_PD.shape[0]
        return y_PD.index_select(0, position_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_ND: Tensor):
        return dy_ND.new_zeros(ctx.P, dy_ND.shape[1]).index_copy_(0, ctx.position_N, dy_ND), None


def _cast_rooms(like: Tensor, dtype: torch.dtype, *elements: int) -> list[Tensor]:
    """Return flat scratch in `dtype` for casts from like's dtype, empty if there is nothing to cast."""
    return [like.new_empty(n if dtype != like.dtype else 0, dtype=dtype) for n in elements]


class _Blocked(torch.autograd.Function):
    """One expert at a time: every matrix product writes into its slice of the result, and experts share all scratch.

    `dtype` is that of the products. If it is not the operands', there is scratch for casts of weights and results too.
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
        xc_ND, dyc_ND = x_ND.to(dtype) if need_w1 else x_ND, dy_ND.to(dtype)
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
                db1_I2 = None if db1_EF is None else db1_EF[e].view(-1, 2)
                between.backward(h_Fn.view(-1, 2, n), da_In, a_In, dh_Fn.view(-1, 2, n), db1_I2)
            if dw2_EID is not None:
                mm_into(a_In, dy_nD, dw2_EID[e], room)
            if db2_ED is not None:
                torch.sum(dy_ND[rows], 0, out=db2_ED[e])
            if dw1_EDF is not None:
                mm_into(xc_ND[rows].t(), dh_Fn.t(), dw1_EDF[e], room)
            if dx_ND is not None:
                mm_into(dh_Fn.t(), cast_into(w1_EDF[e], w1_room).t(), dx_ND[rows], room)
        return None, None, None, dx_ND, dw1_EDF, db1_EF, dw2_EID, db2_ED
