"""bf16 multiplied in float32 against bf16 multiplied as it is, and when which of the two is chosen."""

import platform
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from gptoss_dist.ops import gemm
from gptoss_dist.ops.gemm import cast_into, gemm_dtype, linear, mm_into

SHAPES = [(40, 24), (3, 7, 24), (2, 1, 24), (0, 24), (24,)]


def make_operands(shape, out, dtype, bias=True):
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, (out, shape[-1]), *([(out,)] if bias else [])]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def run(function, operands):
    y = function(*operands)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [t for t in operands if t.requires_grad], dy)]


def assert_rounded_once(actual, operands):
    """Half a bf16 step from float64, and what float32 sums add."""
    exact = run(F.linear, [t.detach().double().requires_grad_(t.requires_grad) for t in operands])
    for a, e in zip(actual, exact, strict=True):
        assert a.dtype == torch.bfloat16 and a.shape == e.shape
        assert ((a.double() - e).abs() <= 2**-8 * e.abs() + 1e-5).all()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("block", [1, 24 * 5, 1 << 18], ids=["one_column", "ragged", "whole"])
@torch.no_grad()
def test_few_rows_without_a_gradient_are_multiplied_by_blocks(monkeypatch, block, bias):
    monkeypatch.setattr(gemm, "CPU_MULTIPLIES_BF16", False)
    monkeypatch.setattr(gemm, "_BLOCK", block)
    calls, run_blocks = [], gemm.mm_in_float32
    monkeypatch.setattr(gemm, "mm_in_float32", lambda *a: calls.append(1) or run_blocks(*a))
    for shape, by_blocks in (((1, 24), 0), ((3, 24), 0), ((4, 24), 1), ((3, 5, 24), 1), ((16, 24), 0)):
        calls.clear()
        operands = make_operands(shape, 17, torch.bfloat16, bias)
        y = linear(*operands)
        exact = F.linear(*(t.double() for t in operands))
        assert len(calls) == by_blocks and y.dtype == torch.bfloat16 and y.shape == exact.shape
        assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()
    weight_DO = torch.randn(24, 17, generator=torch.Generator().manual_seed(2)).bfloat16()  # as experts lay it out
    x_ND = make_operands((6, 24), 17, torch.bfloat16)[0]
    torch.testing.assert_close(run_blocks(x_ND, weight_DO), x_ND.float() @ weight_DO.float())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape, bias, bf16_products):
    operands = make_operands(shape, 17, torch.bfloat16, bias)
    actual = run(linear, operands)
    if bf16_products == "multiplied in float32":
        assert_rounded_once(actual, operands)
    for a, e in zip(actual, run(F.linear, operands), strict=True):
        torch.testing.assert_close(a, e, rtol=2**-7, atol=1e-5)  # a step of bf16: sums may fall on either side
    with torch.no_grad():
        assert torch.equal(linear(*operands), actual[0])


@pytest.mark.parametrize("frozen", range(3))
def test_each_operand_may_be_frozen(frozen, bf16_products):
    operands = make_operands((5, 6), 4, torch.bfloat16)
    operands[frozen].requires_grad_(False)
    for a, e in zip(run(linear, operands), run(F.linear, operands), strict=True):
        torch.testing.assert_close(a, e, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_left_alone(dtype, bf16_products):
    operands = make_operands((40, 24), 17, dtype)
    assert all(torch.equal(a, e) for a, e in zip(run(linear, operands), run(F.linear, operands), strict=True))
    assert gemm_dtype(operands[0], rows=1000) == dtype


def test_only_bf16_is_kept_until_backward(bf16_products):
    operands, kept = make_operands((40, 24), 17, torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        linear(*operands)
    assert set(kept) == {torch.bfloat16}


def test_compiler_and_activation_checkpointing(bf16_products):
    operands = make_operands((3, 7, 24), 17, torch.bfloat16)
    expected = run(linear, operands)
    compiled = torch.compile(lambda *t: linear(*t), backend="aot_eager", fullgraph=True)
    for function in (compiled, lambda *t: checkpoint(linear, *t, use_reentrant=False)):
        assert all(torch.equal(a, e) for a, e in zip(run(function, operands), expected, strict=True))


def test_a_mix_of_dtypes_is_an_error(bf16_products):
    x, weight, bias = make_operands((40, 24), 17, torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x, weight.float(), bias.float())


def test_products_by_way_of_scratch():
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    for dtype in (torch.float32, torch.bfloat16):
        out, room = torch.empty(5, 3, dtype=dtype), torch.empty(40)
        mm_into(a, b, out, room)
        assert torch.equal(out, (a @ b).to(dtype))
        narrow = b.to(dtype).t()
        cast = cast_into(narrow, room)
        assert torch.equal(cast, narrow.float()) and (cast is narrow) == (dtype == torch.float32)


def test_few_rows_are_not_worth_casting(monkeypatch):
    monkeypatch.setattr(gemm, "CPU_MULTIPLIES_BF16", False)
    x = torch.empty(1, dtype=torch.bfloat16)
    assert gemm_dtype(x, rows=gemm.MIN_ROWS - 1) == torch.bfloat16
    assert gemm_dtype(x, rows=gemm.MIN_ROWS) == torch.float32
    assert gemm_dtype(x.to("meta"), rows=gemm.MIN_ROWS) == torch.bfloat16


@pytest.mark.parametrize(
    ("machine", "supported", "expected"),
    [
        ("x86_64", {"avx512_bf16": False, "amx_tile": False}, False),
        ("AMD64", {"avx512_bf16": False, "amx_tile": False}, False),
        ("x86_64", {"avx512_bf16": True, "amx_tile": False}, True),
        ("x86_64", {"avx512_bf16": False, "amx_tile": True}, True),
        ("x86_64", {"avx512_bf16": False}, True),  # a torch that cannot tell
        ("aarch64", {"avx512_bf16": False, "amx_tile": False}, True),
    ],
)
def test_only_a_known_lack_changes_anything(machine, supported, expected, monkeypatch):
    checks = {f"_is_{name}_supported": lambda value=value: value for name, value in supported.items()}
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(**checks))
    assert gemm._cpu_multiplies_bf16() is expected
