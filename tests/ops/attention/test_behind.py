"""Attention of a chunk behind earlier keys against its definition, a mask over all of them."""

import pytest
import torch

from gptoss_dist.ops.attention import tiled
from gptoss_dist.ops.attention.behind import full_attention_behind, visible_behind, windowed_attention_behind
from gptoss_dist.ops.attention.documents import locate_documents, padded_documents
from gptoss_dist.ops.attention.sink_attention import masked_sink_attention

SIZES = [(2, 1), (7, 1), (33, 40), (130, 97), (5, 300)]
"""(T, E): tokens of the chunk, earlier ones."""
PADDING = {"none": (0, 0, 0), "before": (0, 1, 37), "across": (3, 38, 5), "beyond": (0, 400, 90)}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def operands(T: int, E: int, dtype: torch.dtype, device: str = "cpu", H: int = 4, K: int = 2, D: int = 16) -> tuple:
    generator = torch.Generator().manual_seed(T + E)
    q_BTHD = torch.randn(3, T, H, D, generator=generator)
    # Earlier keys are the beginning of a larger buffer, as in a cache.
    k_BKSD, v_BKSD = torch.randn(2, 3, K, E + T + 9, D, generator=generator).unbind(0)
    sinks_H = torch.randn(H, generator=generator)
    q_BTHD, k_BKSD, v_BKSD, sinks_H = (x.to(device, dtype) for x in (q_BTHD, k_BKSD, v_BKSD, sinks_H))
    return q_BTHD.transpose(1, 2), k_BKSD[:, :, : E + T], v_BKSD[:, :, : E + T], sinks_H


def check(found, operands: tuple, visible, dtype: torch.dtype, firsts: tuple, E: int) -> None:
    expected = masked_sink_attention(*(x.double() for x in operands), visible, scale=0.3)
    for row, first in enumerate(firsts):
        text = slice(max(first - E, 0), None)  # what padding gathers is nobody's business
        torch.testing.assert_close(
            found[row, :, text].double(), expected[row, :, text], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )
    assert torch.isfinite(found).all() and found.dtype == dtype


def full(T: int, E: int, dtype: torch.dtype, backend: str, padding: str, device: str = "cpu") -> None:
    q, k, v, sinks = operands(T, E, dtype, device)
    firsts = PADDING[padding]
    found = full_attention_behind(
        q,
        k[:, :, E:],
        v[:, :, E:],
        k[:, :, :E],
        v[:, :, :E],
        sinks,
        scale=0.3,
        firsts=firsts,
        documents=padded_documents([first - E for first in firsts], T, q.device),
        backend=backend,
    )
    check(found, (q, k, v, sinks), visible_behind(T, E + T, None, firsts, q.device), dtype, firsts, E)


@pytest.mark.parametrize("keys", [16384, 16], ids=["one call", "many calls"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("backend", ["flash", "chunked"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_full(dtype, backend, padding, keys, monkeypatch):
    monkeypatch.setattr(tiled, "KEYS_PER_CALL", {"flash": keys, "chunked": keys})
    monkeypatch.setattr(tiled, "ROWS_PER_STRIP", 48)
    for T, E in SIZES:
        full(T, E, dtype, backend, padding)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("backend", ["flash", "chunked", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_windowed(dtype, backend, padding):
    for T, E in SIZES:
        for window in (1, 20, 128):
            q, k, v, sinks = operands(T, E, dtype)
            firsts = PADDING[padding]
            documents = padded_documents(firsts, E + T, q.device)
            found = windowed_attention_behind(
                q, k, v, sinks, scale=0.3, window=window, documents=documents, backend=backend
            )
            check(found, (q, k, v, sinks), visible_behind(T, E + T, window, firsts, q.device), dtype, firsts, E)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize(("dtype", "backend"), [(torch.bfloat16, "flash"), (torch.float32, "chunked")])
def test_full_on_cuda(dtype, backend, padding):
    for T, E in SIZES:
        full(T, E, dtype, backend, padding, "cuda")


@pytest.mark.parametrize("firsts", [(0, 0), (3, 0), (0, 5), (7, 7), (-4, 2), (9, 1)])
def test_padding_is_a_document_before_the_text(firsts):
    found = padded_documents(firsts, 7, torch.device("cpu"))
    if max(firsts) <= 0:
        assert found is None
        return
    first_B1 = torch.tensor(firsts)[:, None]
    expected = locate_documents((torch.arange(7) >= first_B1).long())
    assert torch.equal(found.first_BT, expected.first_BT) and torch.equal(found.cu_seqlens, expected.cu_seqlens)
    assert found.longest == expected.longest
