"""The torch stand-ins against slow, obvious loops; against megablocks' own Triton kernels: test_triton_kernels.py."""

import sys
from types import SimpleNamespace

import pytest
import torch

from gptoss_dist.parallel import megablocks_compat as compat

OPS = compat._ops_module(compiled=None)


def permutation(tokens: int, experts: int, top_k: int, seed: int = 0):
    """Random routing: sorted positions, their bins, the bins' ends, all int32, by plain Python."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(experts, generator=generator)[:top_k].tolist() for _ in range(tokens)]
    pairs = sorted((e, t * top_k + k) for t, row in enumerate(chosen) for k, e in enumerate(row))
    counts = [sum(e == i for e, _ in pairs) for i in range(experts)]
    as_int32 = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    return as_int32([p for _, p in pairs]), as_int32([e for e, _ in pairs]), as_int32(counts).cumsum(0).int()


@pytest.mark.parametrize("tokens, experts, top_k", [(0, 4, 2), (1, 8, 1), (1, 8, 8), (37, 5, 3)])
@pytest.mark.parametrize("dtype, weights_dtype", [("float32",) * 2, ("bfloat16",) * 2, ("bfloat16", "float32")])
def test_row_movement_equals_loops(tokens, experts, top_k, dtype, weights_dtype):
    dtype, weights_dtype = getattr(torch, dtype), getattr(torch, weights_dtype)
    indices, bin_ids, bins = permutation(tokens, experts, top_k)
    x_TD, grad_TD = torch.randn(2, tokens, 12).to(dtype)
    y_ND = torch.randn(tokens * top_k, 12).to(dtype)
    weights = torch.rand(tokens * top_k).to(weights_dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    for w in (None, weights):
        gathered, scattered = torch.zeros(tokens * top_k, 12), torch.zeros(tokens, 12)
        for row, pair in enumerate(indices.tolist()):
            scale = 1.0 if w is None else w[pair].float()
            gathered[row] = x_TD[pair // top_k].float() * scale
            scattered[pair // top_k] += y_ND[row].float() * scale
        for actual, expected in (
            (compat.gather(x_TD, indices, bin_ids, w, bins, top_k), gathered),
            (compat.scatter(y_ND, indices, bin_ids, w, bins, top_k), scattered),
        ):
            assert actual.dtype == dtype
            torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)
    expected = torch.zeros(tokens * top_k)
    for row, pair in enumerate(indices.tolist()):
        expected[pair] = (y_ND[row].float() * grad_TD[pair // top_k].float()).sum()
    actual = compat.scatter_wgrad(y_ND, grad_TD, indices, bin_ids, bins, top_k)
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=4 * tolerance)


def test_sort_is_stable_and_compares_the_low_bits_only():
    x = torch.tensor([6, 1, 5, 1, 2, 6], dtype=torch.int32)
    for end_bit, key in ((32, lambda v: v), (2, lambda v: v & 3)):
        values, positions = torch.empty_like(x), torch.empty_like(x)
        OPS.sort(x, end_bit, values, positions)
        expected = sorted(range(6), key=lambda i: key(x[i].item()))
        assert positions.tolist() == expected and values.tolist() == x[expected].tolist()


def test_histogram_counts_what_is_in_range():
    x = torch.tensor([[0, 2, 2, 7, -1], [3, 3, 3, 3, 3]], dtype=torch.int32)
    assert OPS.histogram(x, 4).tolist() == [[1, 0, 2, 0], [0, 0, 0, 5]]
    assert OPS.histogram(x[0], 3.0).tolist() == [1, 0, 2] and OPS.histogram(x[0], 4).dtype == torch.int32
    assert OPS.histogram(x[0, :0], 2).tolist() == [0, 0]


def test_cumulative_sums():
    x, out = torch.tensor([[3, 0, 4], [1, 1, 1]], dtype=torch.int32), torch.empty(2, 3, dtype=torch.int32)
    OPS.inclusive_cumsum(x, 1, out)
    assert out.tolist() == [[3, 3, 7], [1, 2, 3]]
    OPS.exclusive_cumsum(x, 1, out)
    assert out.tolist() == [[0, 3, 3], [0, 1, 2]]


def test_replicate_and_its_backward_skip_empty_bins():
    bins = torch.tensor([2, 2, 5], dtype=torch.int32)
    out = torch.empty(1, 5, dtype=torch.int32)
    OPS.replicate_forward(torch.tensor([[10, 20, 30]], dtype=torch.int32), bins, out)
    assert out.tolist() == [[10, 10, 30, 30, 30]]
    grad = torch.empty(1, 3)
    OPS.replicate_backward(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), bins, grad)
    assert grad.tolist() == [[3.0, 0.0, 12.0]]


def test_indices_of_the_block_topology():
    out = torch.empty(8, dtype=torch.int16)
    # Expert 0 has one block of 128 rows, expert 1 none, expert 2 three; each row of blocks has two columns.
    OPS.indices(torch.tensor([128, 128, 512], dtype=torch.int32), 128, 4, 2, out)
    assert out.tolist() == [0, 1, 4, 5, 4, 5, 4, 5]


def test_the_device_of_each_call_chooses_the_implementation():
    compiled = SimpleNamespace(**{name: lambda x, *args, name=name: f"compiled {name}" for name in vars(OPS)})
    ops = compat._ops_module(compiled)
    assert ops.histogram(SimpleNamespace(is_cuda=True), 3) == "compiled histogram"
    assert ops.histogram(torch.tensor([2, 2]), 3).tolist() == [0, 0, 2]


def test_triton_kernels_refuse_more_than_they_can_address():
    kernel = compat._limited_to_int32(lambda x, indices, *args: "ran")
    x, rows = torch.empty(1, 2880, device="meta"), 2**31 // 2880
    assert kernel(x, torch.empty(rows, device="meta")) == "ran"
    with pytest.raises(ValueError, match=r"745655 rows .* hidden_size 2880 .* lower train.micro_batch_size"):
        kernel(x, torch.empty(rows + 1, device="meta"))


def test_loading_twice_changes_nothing():
    first = compat.load_megablocks()
    gather = first.kernels.gather
    assert compat.load_megablocks() is first and first.kernels.gather is gather
    assert gather.__wrapped__.__wrapped__.__module__ == "megablocks.backend.kernels"


def test_a_missing_megablocks_names_the_install_script(monkeypatch):
    monkeypatch.setitem(sys.modules, "megablocks_ops", OPS)
    monkeypatch.setitem(sys.modules, "megablocks.layers.dmoe", None)
    with pytest.raises(ImportError, match=r"megablocks cannot be imported .*: sh launch/install.sh"):
        compat.load_megablocks.__wrapped__()


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.gpu
@CUDA
def test_compiled_ops_equal_ours_on_cuda():
    compiled = pytest.importorskip("megablocks_ops")
    generator = torch.Generator().manual_seed(0)
    expert_N = torch.randint(0, 24, (4099,), generator=generator).int().cuda()
    expert_N = expert_N + (expert_N > 7).int()  # expert 8 gets nothing
    counts_1E = compat.histogram(expert_N, 25)[None]
    assert torch.equal(compiled.histogram(expert_N, 25), counts_1E[0])
    results = []
    for ops in (compiled, OPS):
        sorted_N, order_N, total_1E, before_1E = (torch.empty_like(t) for t in (expert_N, expert_N, *[counts_1E] * 2))
        ops.sort(expert_N, 5, sorted_N, order_N)
        ops.inclusive_cumsum(counts_1E, 1, total_1E)
        ops.exclusive_cumsum(counts_1E, 1, before_1E)
        repeated = torch.empty(1, 4099, dtype=torch.int32, device="cuda")
        ops.replicate_forward(torch.arange(25, dtype=torch.int32, device="cuda")[None], total_1E[0], repeated)
        results.append((sorted_N, order_N, total_1E, before_1E, repeated))
    for theirs, ours in zip(*results):
        assert torch.equal(theirs, ours)


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_kernels_equal_their_twins_on_cuda(dtype):
    kernels = compat.load_megablocks().kernels
    indices, bin_ids, bins = (t.cuda() for t in permutation(517, 8, 3))
    x_TD, grad_TD = torch.randn(2, 517, 2880, device="cuda").to(dtype)
    y_ND, weights = torch.randn(517 * 3, 2880, device="cuda").to(dtype), torch.rand(517 * 3, device="cuda").to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for name, *args in (
        ("gather", x_TD, indices, bin_ids, None, bins, 3),
        ("gather", x_TD, indices, bin_ids, weights, bins, 3),
        ("scatter", y_ND, indices, bin_ids, weights, bins, 3),
    ):
        actual, expected = getattr(kernels, name)(*args), getattr(compat, name)(*args)
        torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)
    actual = kernels.scatter_wgrad(y_ND, grad_TD, indices, bin_ids, bins, 3).float()
    expected = compat.scatter_wgrad(y_ND.double(), grad_TD.double(), indices, bin_ids, bins, 3).float()
    # A sum of 2880 products of unit variance: relative to its standard deviation.
    assert (actual - expected).abs().max() <= tolerance * 2880**0.5
