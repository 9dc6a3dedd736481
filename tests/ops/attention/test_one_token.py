"""Attention of one new token against its slow twin, which masks all scores."""

import pytest
import torch

from gptoss_dist.ops.attention.one_token import one_token_attention
from gptoss_dist.ops.attention.sink_attention import masked_sink_attention

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def inputs(B: int, H: int, K: int, S: int, D: int, dtype):
    """Queries as attention lays them out, keys and values as part of a longer buffer, large sinks."""
    generator = torch.Generator().manual_seed(S)
    q_B1HD = torch.randn(B, 1, H, D, generator=generator).to(dtype)
    k, v = (torch.full((B, K, S + 5, D), torch.nan, dtype=dtype) for _ in range(2))
    for buffer in (k, v):
        buffer[:, :, :S] = torch.randn(B, K, S, D, generator=generator)
    return q_B1HD.transpose(1, 2), k[:, :, :S], v[:, :, :S], torch.randn(H, generator=generator).to(dtype) * 3


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("masked", ["none", "all rows alike", "by row"])
@pytest.mark.parametrize(("B", "H", "K", "D"), [(1, 4, 4, 8), (3, 6, 2, 5), (2, 8, 1, 32)])
@pytest.mark.parametrize("S", [1, 2, 7, 128, 513])
@torch.no_grad()
def test_matches_the_definition(B, H, K, D, S, masked, dtype):
    q, k, v, sinks = inputs(B, H, K, S, D, dtype)
    visible = None
    if masked != "none":
        rows = 1 if masked == "all rows alike" else B
        visible = torch.rand(rows, 1, S, generator=torch.Generator().manual_seed(1)) < 0.6
        visible[..., -1] = True
        visible = visible[0] if rows == 1 else visible
    fast = one_token_attention(q, k, v, sinks, visible, scale=0.4)
    slow = masked_sink_attention(q, k, v, sinks, visible, scale=0.4)
    assert fast.dtype == dtype and fast.shape == slow.shape
    assert (fast.double() - slow.double()).norm() <= TOLERANCE[dtype] * slow.double().norm()


def test_with_gradients_it_is_the_definition():
    q, k, v, sinks = (x.detach().requires_grad_() for x in inputs(2, 4, 2, 9, 8, torch.float32))
    assert torch.equal(
        one_token_attention(q, k, v, sinks, None, scale=1.0), masked_sink_attention(q, k, v, sinks, None, scale=1.0)
    )
