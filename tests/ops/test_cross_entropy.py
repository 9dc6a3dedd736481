"""The chunked cross entropy against F.cross_entropy on all logits: loss, gradients, and the memory it must not take."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptoss_dist.ops import cross_entropy as module
from gptoss_dist.ops.cross_entropy import linear_cross_entropy

# bf16: logits are rounded alike in both; the gradient of the logits is rounded in `chunked` only.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}
IGNORE = -100


def make_operands(N, D, V, dtype, bias=False, ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias_V = (torch.randn(shape, generator=generator) for shape in ((N, D), (V, D), (V,)))
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < ignored] = IGNORE
    tensors = [hidden, weight] + ([bias_V] if bias else [])
    return [t.to(dtype).requires_grad_() for t in tensors], labels


def run(tensors, labels, scale=1.0, **kwargs):
    hidden, weight, *bias = tensors
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias[0] if bias else None, **kwargs)
    assert loss.dtype == torch.float32 and loss.dim() == 0
    wanted = [t for t in tensors if t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss * scale, wanted)]


def assert_close(actual, expected, tolerance):
    assert len(actual) == len(expected)
    for name, a, b in zip(("loss", "first gradient", "second gradient", "third gradient"), actual, expected):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        error = (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize(("N", "chunk_tokens"), [(37, 8), (37, 37), (37, 100), (1, 1), (64, 16), (37, None)])
def test_matches_reference(dtype, bias, N, chunk_tokens):
    tensors, labels = make_operands(N, 12, 29, dtype, bias)
    labels[0] = 5
    expected = run(tensors, labels, scale=0.37, backend="reference")
    # the loss itself is always fp32, whatever the precision of the gradients
    assert_close(run(tensors, labels, scale=0.37, chunk_tokens=chunk_tokens), expected, max(TOLERANCE[dtype], 1e-7))


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize(("N", "chunk_tokens"), [(37, 8), (37, 100), (1, 1), (0, 4)])
def test_bf16_either_way(N, chunk_tokens, bias, bf16_products):
    tensors, labels = make_operands(N, 12, 29, torch.bfloat16, bias)
    actual = run(tensors, labels, scale=0.37, chunk_tokens=chunk_tokens)
    assert_close(actual, run(tensors, labels, scale=0.37, backend="reference"), 1e-2)
    exact = run([t.detach().float().requires_grad_() for t in tensors], labels, scale=0.37, backend="reference")
    if bf16_products == "multiplied in float32":  # nothing but the gradients is rounded, and only once
        assert_close(actual, [exact[0], *(g.bfloat16() for g in exact[1:])], 1e-3)


def test_reference_is_cross_entropy():
    (hidden, weight), labels = make_operands(20, 6, 11, torch.float32)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, backend="reference"), expected)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), expected)


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_gradcheck_of_the_scaled_loss(bias):
    """Finite differences see the fp32 loss, hence the tolerance; a wrong factor or sign is far beyond it."""
    tensors, labels = make_operands(7, 4, 5, torch.float64, bias)

    def function(hidden, weight, *bias):
        return linear_cross_entropy(hidden, weight, labels, chunk_tokens=3, bias=bias[0] if bias else None) * 3.0

    assert torch.autograd.gradcheck(function, tensors, eps=1e-2, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_operand_may_be_frozen(frozen):
    tensors, labels = make_operands(19, 6, 11, torch.float32)
    tensors[frozen].requires_grad_(False)
    assert_close(run(tensors, labels, chunk_tokens=4), run(tensors, labels, backend="reference"), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [0, 9])
def test_nothing_to_predict(dtype, N):
    tensors, labels = make_operands(N, 6, 11, dtype, ignored=2.0)
    loss, *grads = run(tensors, labels, chunk_tokens=4)
    assert loss == 0
    assert [g.shape for g in grads] == [t.shape for t in tensors] and not any(g.any() for g in grads)


def test_ignored_rows_are_masked_inside_the_kernel_too():
    """What runs on an accelerator, where ignored tokens are not dropped beforehand."""
    tensors, labels = make_operands(19, 6, 11, torch.float32, bias=True)
    expected = run(tensors, labels, backend="reference")
    loss = module._ChunkedCrossEntropy.apply(*tensors, labels, IGNORE, 4, True)
    assert_close([loss.detach(), *torch.autograd.grad(loss, tensors)], expected, 1e-6)


def test_extreme_logits_stay_finite_and_right():
    """The label's probability underflows to zero; the loss must be the logit gap, not infinity."""
    hidden, weight = (
        torch.tensor([[300.0]], requires_grad=True),
        torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True),
    )
    loss, d_hidden, d_weight = run([hidden, weight], torch.tensor([2]))
    assert loss == 600
    torch.testing.assert_close(d_hidden, torch.tensor([[2.0]]))
    torch.testing.assert_close(d_weight, torch.tensor([[300.0], [0.0], [-300.0]]))


def test_weight_gradient_accumulates_beyond_16_bits():
    """768 chunks add 1/2 each: a bf16 sum would stop growing at 128 (8 significant bits)."""
    N = 768
    hidden = torch.ones(N, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    _, _, d_weight = run([hidden, weight], torch.zeros(N, dtype=torch.int64), chunk_tokens=1)
    torch.testing.assert_close(d_weight.float(), torch.tensor([[-N / 2.0], [N / 2.0]]))


def test_backward_twice_no_grad_and_larger_graphs():
    (hidden, weight), labels = make_operands(19, 6, 11, torch.float32)
    loss = linear_cross_entropy(hidden * 2, weight, labels, chunk_tokens=4) / 3
    first, second = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2))
    reference = linear_cross_entropy(hidden * 2, weight, labels, backend="reference") / 3
    for a, b, c in zip(first, second, torch.autograd.grad(reference, (hidden, weight))):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden * 2, weight, labels, chunk_tokens=4) / 3, loss)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage that any operation returned, and how many matrix products ran."""

    def __init__(self):
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow_with_tokens_times_vocabulary(dtype):
    C, D, V = 16, 8, 512
    for N in (64, 1024):
        tensors, labels = make_operands(N, D, V, dtype)
        with LargestTensor() as seen:
            run(tensors, labels, chunk_tokens=C)
        assert seen.elements <= max(C * V, V * D, N * D), f"a tensor of {seen.elements} elements at N={N}"
        with LargestTensor() as seen:
            run(tensors, labels, backend="reference")
        assert seen.elements >= N * V, "the measurement itself must be able to see the logits"


@pytest.mark.parametrize(
    ("requires_grad", "products"), [((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)]
)
def test_only_the_products_that_are_needed_run(requires_grad, products):
    (hidden, weight), labels = make_operands(8, 6, 11, torch.float32)
    hidden.requires_grad_(requires_grad[0])
    weight.requires_grad_(requires_grad[1])
    with LargestTensor() as seen:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=8)
    assert seen.products == products


def test_mistakes_are_named():
    (hidden, weight), labels = make_operands(8, 6, 11, torch.float32, ignored=0.0)
    for bad in (-1, 11):
        with pytest.raises(IndexError, match="vocabulary has 11"):
            linear_cross_entropy(hidden, weight, labels.index_fill(0, torch.tensor([3]), bad))
    with pytest.raises(ValueError, match="flatten"):
        linear_cross_entropy(hidden[None], weight, labels[None])
    with pytest.raises(ValueError, match="hidden size 6"):
        linear_cross_entropy(hidden, weight[:, 1:], labels)
    with pytest.raises(ValueError, match=r"weight is torch\.bfloat16"):
        linear_cross_entropy(hidden, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=0)
    with pytest.raises(ValueError, match="fused"):
        linear_cross_entropy(hidden, weight, labels, backend="fused")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cuda_matches_the_cpu(dtype):
    tensors, labels = make_operands(70, 64, 130, dtype, bias=True)
    expected = run(tensors, labels, scale=0.37, backend="reference")
    on_gpu = [t.detach().cuda().requires_grad_() for t in tensors]
    actual = run(on_gpu, labels.cuda(), scale=0.37, chunk_tokens=16)
    assert_close([t.cpu() for t in actual], expected, 2e-2 if dtype == torch.bfloat16 else 1e-5)
