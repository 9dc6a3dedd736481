"""Every back end against the loop: outputs and all gradients, over sizes that include the ugly ones.

Shape legend as in the module under test: N rows, E experts, D hidden, I intermediate.
"""

import sys
import typing
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gptoss_dist.config import ParallelConfig
from gptoss_dist.ops.backends import serves_all
from gptoss_dist.ops.experts import activation as gated_activation
from gptoss_dist.ops.experts.activation import gating_of, swiglu, swiglu_reference
from gptoss_dist.ops.experts.cpu_blocked import in_few_sizes, positions
from gptoss_dist.ops.experts.grouped_experts import AUTO_ORDER, BACKENDS, grouped_experts

NAMES = ("y", "x", "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
# fp32: summation order only. bf16: each result carries a few roundings of 2^-9, at different places in each back end.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}
COUNTS = {
    "ragged": [7, 0, 33, 1, 0],
    "all_to_one": [0, 40, 0],
    "single_expert": [19],
    "first_and_last_idle": [0, 5, 11, 0],
    "no_rows": [0, 0, 0],
}


def make_operands(counts, D, I, dtype, bias=True, seed=0):  # noqa: E741
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_()

    E = len(counts)
    # x is large enough that a few pre-activations in a hundred exceed the limit of 7, on both sides.
    x, w1, w2 = random(sum(counts), D, scale=3.5), random(E, D, 2 * I, scale=D**-0.5), random(E, I, D, scale=I**-0.5)
    return [x, w1, random(E, 2 * I) if bias else None, w2, random(E, D) if bias else None]


def run(operands, counts, **kwargs):
    """Output and gradients, by name; a gradient that autograd did not produce is None."""
    x, *weights = operands
    y = grouped_experts(x, torch.tensor(counts), *weights, **kwargs)
    d_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    wanted = [t for t in operands if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(y, wanted, d_y, allow_unused=True))
    results = [y.detach(), *(next(grads) if t is not None and t.requires_grad else None for t in operands)]
    return dict(zip(NAMES, results))


def assert_close(actual, expected, tolerance):
    for name, reference in expected.items():
        if reference is None:
            assert actual[name] is None, name
            continue
        assert actual[name].dtype == reference.dtype and actual[name].shape == reference.shape, name
        error = (actual[name].double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


@pytest.fixture
def seen_batch_sizes(monkeypatch):
    """Stands in for the `grouped_gemm` package, whose own kernels need CUDA: as strict about what it is given, and
    differentiable like it. The `batch_sizes` of every call."""
    row = BACKENDS["grouped_gemm"]
    monkeypatch.setitem(BACKENDS, "grouped_gemm", row._replace(why_not=serves_all))
    seen = []

    def gmm(a, b, batch_sizes, trans_b=False):
        assert a.dtype == b.dtype == torch.bfloat16 and a.is_contiguous() and b.is_contiguous() and not trans_b
        assert batch_sizes.dtype == torch.int64 and batch_sizes.device.type == "cpu" and batch_sizes.dim() == 1
        seen.append(batch_sizes)
        return torch.cat([rows @ matrix for rows, matrix in zip(a.split(batch_sizes.tolist()), b)])

    monkeypatch.setitem(sys.modules, "grouped_gemm", SimpleNamespace(ops=SimpleNamespace(gmm=gmm)))
    return seen


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("activation", ["gpt_oss", "silu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("backend", "dtype", "D", "I"),
    [
        ("blocked", torch.float64, 5, 3),
        ("blocked", torch.float32, 17, 13),
        ("blocked", torch.bfloat16, 24, 40),
        ("grouped_mm", torch.float32, 16, 24),
        ("grouped_mm", torch.bfloat16, 24, 40),
        ("grouped_gemm", torch.bfloat16, 17, 13),
    ],
)
def test_matches_loop(backend, dtype, D, I, bias, activation, counts, seen_batch_sizes):  # noqa: E741
    operands = make_operands(counts, D, I, dtype, bias)
    expected = run(operands, counts, activation=activation, backend="loop")
    actual = run(operands, counts, activation=activation, backend=backend)
    assert_close(actual, expected, TOLERANCE[dtype])
    assert [sizes.tolist() for sizes in seen_batch_sizes] == ([counts, counts] if backend == "grouped_gemm" else [])
    for e, n in enumerate(counts):
        if n == 0:
            for name in NAMES[2:]:
                assert actual[name] is None or not actual[name][e].any(), (
                    f"expert {e} had no rows but {name} has a gradient"
                )


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("activation", ["gpt_oss", "silu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_bf16_matches_loop_either_way(bias, activation, counts, bf16_products):
    for D, I in ((24, 40), (40, 5)):  # noqa: E741
        operands = make_operands(counts, D, I, torch.bfloat16, bias)
        expected = run(operands, counts, activation=activation, backend="loop")
        actual = run(operands, counts, activation=activation, backend="blocked")
        assert_close(actual, expected, TOLERANCE[torch.bfloat16])
        with torch.no_grad():
            y = grouped_experts(operands[0], torch.tensor(counts), *operands[1:], activation=activation)
        assert torch.equal(y, actual["y"])


@pytest.mark.parametrize("frozen", range(5), ids=NAMES[1:])
def test_each_bf16_operand_may_be_frozen(frozen, bf16_products):
    counts = [9, 0, 6]
    operands = make_operands(counts, 16, 8, torch.bfloat16)
    operands[frozen].requires_grad_(False)
    expected = run(operands, counts, activation="gpt_oss", backend="loop")
    assert_close(run(operands, counts, activation="gpt_oss"), expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("activation", ["gpt_oss", "silu"])
def test_blocked_matches_loop_across_many_chunks(activation, monkeypatch):
    """Chunks smaller than one row, and clamps that bind in some chunks only (so that some may be skipped)."""
    counts = [50, 3]
    operands = make_operands(counts, 8, 12, torch.float32)
    expected = run(operands, counts, activation=activation, backend="loop")
    for elements in (1, 100, 130):
        monkeypatch.setattr(gated_activation, "_CHUNK_ELEMENTS", elements)
        assert_close(run(operands, counts, activation=activation, backend="blocked"), expected, 1e-6)


def test_bf16_activation_rounds_once(bf16_products):
    """Against float64, `blocked` errs less than the loop, which rounds each operation. (`silu`: no clamp to flip.)"""
    counts = [60, 0, 68]
    operands = make_operands(counts, 64, 96, torch.bfloat16)
    exact = run([t.detach().double().requires_grad_() for t in operands], counts, activation="silu", backend="loop")

    def errors(backend):
        result = run(operands, counts, activation="silu", backend=backend)
        return [((result[k].double() - exact[k]).norm() / exact[k].norm()).item() for k in NAMES]

    blocked, loop = errors("blocked"), errors("loop")
    assert max(blocked) < 6e-3
    assert all(b <= 1.02 * r for b, r in zip(blocked, loop)) and sum(blocked) < 0.95 * sum(loop), (blocked, loop)


@pytest.mark.parametrize("backend", ["loop", "blocked"])
@pytest.mark.parametrize("activation", ["gpt_oss", "silu"])
def test_gradcheck(backend, activation):
    counts = [3, 0, 2]
    x, *weights = make_operands(counts, 4, 3, torch.float64)

    def function(*tensors):
        # limit 2 so that finite differences see clamped and free values alike
        return grouped_experts(
            tensors[0], torch.tensor(counts), *tensors[1:], activation=activation, limit=2.0, backend=backend
        )

    assert torch.autograd.gradcheck(function, (x, *weights), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_passes_at_the_limit_exactly(dtype):
    """torch.clamp's convention: at the limit the gradient passes, one representable number beyond it does not."""
    seven = torch.tensor(7.0, dtype=dtype)
    beyond = torch.nextafter(seven, torch.tensor(8.0, dtype=dtype))
    for gate, up in ((seven, -seven), (beyond, -beyond), (-beyond, beyond), (seven, beyond)):
        h = torch.stack([gate, up]).expand(4, 2).contiguous().requires_grad_()
        w1 = torch.eye(2, dtype=dtype)[None].requires_grad_()  # pre-activations are x itself
        w2 = torch.ones(1, 1, 2, dtype=dtype)
        for compute in (
            lambda h, w1=w1, w2=w2: grouped_experts(
                h, torch.tensor([4]), w1, None, w2, None, activation="gpt_oss", backend="blocked"
            ),
            lambda h: swiglu(h, "gpt_oss"),
        ):
            (actual,) = torch.autograd.grad(compute(h).sum(), h)
            assert bool(actual[0, 0]) == (gate <= 7) and bool(actual[0, 1]) == (up.abs() <= 7), (gate, up, actual[0])


@pytest.mark.parametrize("activation", ["gpt_oss", "silu"])
def test_swiglu_under_the_compiler(activation):
    """There it is the plain formula, for the compiler to fuse; no graph break."""
    h = (torch.randn(9, 14, generator=torch.Generator().manual_seed(0)) * 5).requires_grad_()
    results = []
    for function in (swiglu, torch.compile(swiglu, backend="aot_eager", fullgraph=True)):
        y = function(h, activation)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), h)))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_experts_come_in_few_sizes():
    """At most a sixteenth more rows, at most 16 sizes per power of two, and each row at a place of its own."""
    counts = [*range(1100)]
    room = in_few_sizes(counts)
    position = positions(counts, room)
    assert all(n <= r <= n + n // 16 for n, r in zip(counts, room))
    assert len({r for r in room if 512 < r <= 1024}) == 16
    starts = torch.tensor([0, *room]).cumsum(0)[:-1]
    expected = torch.cat([start + torch.arange(n) for start, n in zip(starts, counts)])
    assert torch.equal(position, expected)


def test_known_value():
    """One neuron by hand: gate 9 is clamped to 7, up -8 to -7, and -7 + 1 = -6."""
    x, w1, w2 = torch.tensor([[9.0, -8.0]]), torch.eye(2)[None], torch.ones(1, 1, 2)
    clamped = 7 * torch.sigmoid(torch.tensor(7 * 1.702)) * -6
    silu = 9 * torch.sigmoid(torch.tensor(9.0)) * -8
    for backend in ("loop", "blocked"):
        for activation, value in (("gpt_oss", clamped), ("silu", silu)):
            y = grouped_experts(x, torch.tensor([1]), w1, None, w2, None, activation=activation, backend=backend)
            torch.testing.assert_close(y, value.expand(1, 2))


@pytest.mark.parametrize("backend", ["blocked", "grouped_mm"])
@pytest.mark.parametrize("frozen", range(5), ids=NAMES[1:])
def test_each_operand_may_be_frozen(backend, frozen):
    counts = [9, 0, 6]
    operands = make_operands(counts, 16, 8, torch.float32)
    operands[frozen].requires_grad_(False)
    expected = run(operands, counts, activation="gpt_oss", backend="loop")
    assert expected[NAMES[frozen + 1]] is None
    assert_close(run(operands, counts, activation="gpt_oss", backend=backend), expected, 1e-6)


@pytest.mark.parametrize("backend", ["blocked", "grouped_mm"])
def test_activation_checkpointing_expanded_gradients_and_no_grad(backend):
    counts = torch.tensor([9, 0, 6])
    x, *weights = make_operands(counts.tolist(), 16, 8, torch.float32)

    def function(rows, backend=backend):
        return grouped_experts(rows * 2, counts, *weights, activation="gpt_oss", backend=backend)

    expected = torch.autograd.grad(function(x, "loop").sum(), (x, *weights))  # the gradient of a sum has stride 0
    plain = function(x)
    with torch.no_grad():
        assert torch.equal(function(x), plain)
    for y in (plain, checkpoint(function, x, use_reentrant=False)):
        for _ in range(2):  # a second backward over the same graph must see unspoilt saved tensors
            for actual, reference in zip(torch.autograd.grad(y.sum(), (x, *weights), retain_graph=True), expected):
                torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)


def test_weights_may_be_transposed_views():
    counts = [9, 6]
    operands = make_operands(counts, 16, 8, torch.float32, bias=False)
    views = [t if t is None or t.dim() == 2 else t.detach().mT.contiguous().mT.requires_grad_() for t in operands]
    expected = run(operands, counts, activation="silu", backend="loop")
    for backend in ("blocked", "grouped_mm"):
        assert_close(run(views, counts, activation="silu", backend=backend), expected, 1e-6)


@pytest.mark.parametrize("activation", ["gpt_oss", "silu"])
@pytest.mark.parametrize("shape", [(6, 10), (2, 3, 10), (0, 10)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_swiglu_alone(dtype, shape, activation):
    h = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 5).to(dtype).requires_grad_()
    gating = gating_of(activation, 1.702, 7.0)
    expected, actual = swiglu_reference(h, gating), swiglu(h, activation)
    d_out = torch.ones_like(expected)[..., :1].expand_as(expected)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype] * 5}
    torch.testing.assert_close(actual, expected, **tolerance)
    (expected_grad,), (actual_grad,) = (torch.autograd.grad(y, h, d_out) for y in (expected, actual))
    torch.testing.assert_close(actual_grad, expected_grad, **tolerance)


def test_auto_serves_what_grouped_mm_cannot():
    counts = [4, 5]
    operands = make_operands(counts, 7, 3, torch.float32)
    assert_close(
        run(operands, counts, activation="silu"), run(operands, counts, activation="silu", backend="loop"), 1e-6
    )
    with pytest.raises(ValueError, match="multiples of 4"):
        run(operands, counts, activation="silu", backend="grouped_mm")


def test_mistakes_are_named():
    x, *weights = make_operands([4, 5], 8, 8, torch.float32)
    counts = torch.tensor([4, 5])
    with pytest.raises(ValueError, match="relu"):
        grouped_experts(x, counts, *weights, activation="relu")
    with pytest.raises(ValueError, match="fast"):
        grouped_experts(x, counts, *weights, activation="silu", backend="fast")
    with pytest.raises(ValueError, match="sums to 8 but x has 9"):
        grouped_experts(x, counts - torch.tensor([0, 1]), *weights, activation="silu")
    with pytest.raises(ValueError, match=r"down_proj is torch\.bfloat16"):
        grouped_experts(x, counts, *weights[:2], weights[2].bfloat16(), weights[3], activation="silu")
    with pytest.raises(ValueError, match="gate_up_proj_bias has shape"):
        grouped_experts(x, counts, weights[0], weights[1][:, 1:], *weights[2:], activation="silu")


def test_grouped_gemm_makes_its_operands_suit_the_package(seen_batch_sizes):
    """Row counts of another dtype, rows and weights that are views: the fake insists on what the package insists on."""
    x, w1, _, w2, _ = (t if t is None else t.detach() for t in make_operands([9, 6], 16, 8, torch.bfloat16, bias=False))
    counts = torch.tensor([9, 6], dtype=torch.int32)
    expected = grouped_experts(x, counts, w1, None, w2, None, activation="silu", backend="loop")
    views = (x.T.contiguous().T, counts, w1.mT.contiguous().mT, None, w2.mT.contiguous().mT, None)
    actual = grouped_experts(*views, activation="silu", backend="grouped_gemm")
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    assert len(seen_batch_sizes) == 2


def test_grouped_gemm_is_told_only_counts_that_fit(seen_batch_sizes):
    x, *weights = make_operands([4, 5], 8, 8, torch.bfloat16)
    with pytest.raises(ValueError, match="sums to 8 but x has 9"):
        grouped_experts(x, torch.tensor([4, 4]), *weights, activation="silu", backend="grouped_gemm")
    assert seen_batch_sizes == []


def test_what_grouped_gemm_cannot_do_is_named(monkeypatch):
    x, *weights = make_operands([4, 5], 8, 8, torch.bfloat16)
    with pytest.raises(ValueError, match="backend='grouped_gemm' computes on CUDA only; use backend='auto'"):
        grouped_experts(x, torch.tensor([4, 5]), *weights, activation="silu", backend="grouped_gemm")
    why_not, sizes, cuda = BACKENDS["grouped_gemm"].why_not, (8, 8), torch.device("cuda")
    for dtype in (torch.float32, torch.float16):
        assert why_not(dtype, sizes, cuda) == "computes in bf16 only"
    monkeypatch.setitem(sys.modules, "grouped_gemm", SimpleNamespace())
    assert why_not(torch.bfloat16, sizes, cuda) is None
    monkeypatch.setitem(sys.modules, "grouped_gemm", None)  # what makes Python's import of it fail
    assert "cannot be imported" in (reason := why_not(torch.bfloat16, sizes, cuda)) and "pip install" in reason


def test_the_settings_offer_what_the_table_holds():
    choices = typing.get_args(typing.get_type_hints(ParallelConfig)["expert_gemm"])
    assert choices == ("auto", *BACKENDS)


def test_auto_always_finds_one():
    for order in AUTO_ORDER.values():
        assert BACKENDS[order[-1]].why_not is serves_all


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    ("backend", "dtype"), [("auto", torch.bfloat16), ("auto", torch.float32), ("grouped_gemm", torch.bfloat16)]
)
def test_grouped_gemms_on_cuda_match_the_cpu(backend, dtype):
    if backend == "grouped_gemm":
        pytest.importorskip("grouped_gemm")
    counts = [70, 0, 33, 1, 0]
    operands = make_operands(counts, 64, 96, dtype)
    expected = run(operands, counts, activation="gpt_oss", backend="loop")
    x, *weights = (t.detach().cuda().requires_grad_() for t in operands)
    y = grouped_experts(x, torch.tensor(counts, device="cuda"), *weights, activation="gpt_oss", backend=backend)
    d_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
    actual = dict(zip(NAMES, (t.cpu() for t in (y.detach(), *torch.autograd.grad(y, (x, *weights), d_y)))))
    assert_close(actual, expected, 2e-2 if dtype == torch.bfloat16 else 1e-5)
