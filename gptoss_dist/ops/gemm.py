"""The dtype in which matrices are multiplied: bf16 ones in float32 on CPUs that have no instructions for bf16.

Such a CPU emulates bf16 products at about a quarter of its float32 rate (docs/log.md). A product of two bf16 numbers is
exact in float32, and products are summed in float32 either way: operands that are cast up, multiplied in float32 and
rounded give what the emulation gives, up to the order of summation.

Shapes: N rows (any leading dimensions), D inputs, O outputs.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _cpu_multiplies_bf16() -> bool:
    """Return False only where it is known that the instructions are missing.

    Nobody has measured which way is faster on ARM, so that nothing changes there.
    """
    checks = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    if platform.machine().lower() not in ("x86_64", "amd64") or None in checks:
        return True
    return any(check() for check in checks if check is not None)


CPU_MULTIPLIES_BF16 = _cpu_multiplies_bf16()  # not a cached function: torch.compile could not see through that

MIN_ROWS = 16
"""With fewer rows, as in decoding, casting the other matrix costs more than the emulation (docs/log.md)."""


def gemm_dtype(x: Tensor, rows: int) -> torch.dtype:
    """Return the dtype to which to cast both operands of a product: x's own, save for bf16 where the CPU lacks it.

    Args:
        x: An operand.
        rows: How many rows of it meet each matrix; their number decides whether it pays to cast the matrix.
    """
    emulated = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not CPU_MULTIPLIES_BF16
    return torch.float32 if emulated and rows >= MIN_ROWS else x.dtype


MIN_ROWS_BY_BLOCKS = 4
"""The same for casting by blocks that stay in the cache (`mm_in_float32`), without a gradient."""

_BLOCK = 1 << 18
"""Elements of a block: 1 MiB in float32."""


def cast_into(t: Tensor, room: Tensor) -> Tensor:
    """Return t in the dtype of `room`: itself, or a contiguous copy at the beginning of `room`, which is flat."""
    return t if t.dtype == room.dtype else room[: t.numel()].view(t.shape).copy_(t)


def mm_into(a: Tensor, b: Tensor, out: Tensor, room: Tensor) -> None:
    """Compute out = a @ b, through `room` (flat, in their dtype) and rounded if out's dtype differs from theirs."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b, out=room[: out.numel()].view(out.shape)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `F.linear`, computed in the dtype of `gemm_dtype` and rounded once to x's dtype, behind the bias."""
    rows = x.numel() // max(x.shape[-1], 1)
    if weight.dtype != x.dtype:
        return F.linear(x, weight, bias)
    if gemm_dtype(x, rows) != x.dtype:
        return _LinearInFloat32.apply(x, weight, bias)
    if MIN_ROWS_BY_BLOCKS <= rows < MIN_ROWS and gemm_dtype(x, MIN_ROWS) != x.dtype and not torch.is_grad_enabled():
        multiply = _mm_in_float32 if torch.compiler.is_compiling() else mm_in_float32
        y_NO = multiply(x.reshape(rows, -1), weight.t())
        return (y_NO if bias is None else y_NO.add_(bias)).to(x.dtype).view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def mm_in_float32(x_ND: Tensor, weight_DO: Tensor) -> Tensor:
    """Return x @ weight in float32, [N, O], for a few rows in a lower precision.

    Columns of the weight are cast by blocks, each of which is multiplied while it is in the cache. The weight may be a
    transposed view; there is no gradient.
    """
    (D, O), N = weight_DO.shape, x_ND.shape[0]  # noqa: E741
    step = min(max(_BLOCK // max(D, 1), 1), O)
    room, transposed = torch.empty(D * step, device=x_ND.device), weight_DO.stride(0) == 1
    x32_ND, out_NO = x_ND.float(), torch.empty(N, O, device=x_ND.device)
    for start in range(0, O, step):
        block_Do = weight_DO[:, start : start + step]
        shape = block_Do.shape
        flat = room[: block_Do.numel()]
        cast_Do = flat.view(shape[1], shape[0]).t() if transposed else flat.view(shape)
        torch.mm(x32_ND, cast_Do.copy_(block_Do), out=out_NO[:, start : start + step])
    return out_NO


_mm_in_float32 = torch.library.custom_op("gptoss_dist::mm_in_float32", mm_in_float32, mutates_args=())
"""The same for a compiler, which would take the blocks apart."""
_mm_in_float32.register_fake(lambda x, w: x.new_empty(x.shape[0], w.shape[1], dtype=torch.float32))


class _LinearInFloat32(torch.autograd.Function):
    """A product in float32 that keeps bf16 operands until backward; plain autograd would keep float32 copies."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OD)
        return F.linear(x.float(), weight_OD.float(), None if bias_O is None else bias_O.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight_OD = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        dy32 = dy.float()
        dy32_NO, x_ND = (t.reshape(-1, t.shape[-1]) for t in (dy32, x))
        dx = (dy32 @ weight_OD.float()).to(x.dtype) if need_x else None
        dweight_OD = (dy32_NO.t() @ x_ND.float()).to(weight_OD.dtype) if need_weight else None
        dbias_O = dy32_NO.sum(0).to(weight_OD.dtype) if need_bias else None
        return dx, dweight_OD, dbias_O
