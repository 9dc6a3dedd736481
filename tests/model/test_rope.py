import torch

from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.rope import RotaryTables, apply_rotary


def test_rotation_and_its_gradient():
    config = ModelConfig(head_dim=8, rope_scaling=None, num_hidden_layers=2)
    cos, sin = RotaryTables(config)(torch.arange(5), torch.float64)["full_attention"]
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    y = apply_rotary(x, cos, sin)
    a, b = x.detach().chunk(2, dim=-1)
    rotated = torch.view_as_real(torch.complex(a, b) * torch.complex(cos, sin)[:, None])
    torch.testing.assert_close(y, torch.cat(rotated.unbind(-1), dim=-1))
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos, sin), (x,))
    transposed = torch.randn(2, 3, 5, 8, dtype=torch.float64).transpose(1, 2)
    torch.testing.assert_close(apply_rotary(transposed, cos, sin), apply_rotary(transposed.contiguous(), cos, sin))


def test_scores_depend_on_distance_only():
    config = ModelConfig(head_dim=16, num_hidden_layers=2)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(i: int, j: int) -> torch.Tensor:
        tables = RotaryTables(config)(torch.tensor([i, j]), torch.float32)["full_attention"]
        (cos_i, cos_j), (sin_i, sin_j) = (t.split(1) for t in tables)
        return (apply_rotary(q, cos_i, sin_i) * apply_rotary(k, cos_j, sin_j)).sum()

    torch.testing.assert_close(score(7, 3), score(1007, 1003), rtol=1e-4, atol=1e-4)
    assert (score(7, 3) - score(9, 3)).abs() > 1e-3
