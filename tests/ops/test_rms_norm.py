import pytest
import torch

from gptoss_dist.ops.rms_norm import rms_norm


def results(backend, x, weight, direction):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = rms_norm(x, weight, 1e-5, backend=backend)
    y.backward(direction)
    return y, x.grad, weight.grad


@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 64), (2, 1, 96)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_fused_equals_reference(shape, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    x[0] *= 1e-3  # where eps matters
    weight = (1 + 0.5 * torch.randn(shape[-1], generator=generator)).to(dtype)
    for a, b in zip(results("fused", x, weight, direction), results("reference", x, weight, direction)):
        assert a.dtype == b.dtype == dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    with torch.no_grad():  # a way of its own for few rows
        a, b = rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5, backend="reference")
    assert a.dtype == dtype and (a - b).abs().max() <= tolerance * b.abs().max()


def test_torch_agrees():
    x, weight = torch.randn(4, 32), torch.randn(32)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (32,), weight, 1e-5))


def test_gradcheck():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))
    with pytest.raises(ValueError, match="quick"):
        rms_norm(x, weight, 1e-5, backend="quick")
