"""Attention of a sequence that is split over the processes of one launch, beside that of the whole sequence in each:

torchrun ... tests/support/context_attention.py CASES.json FOLDER
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from gptoss_dist.distributed.processes import Ranks, init_distributed, shut_down
from gptoss_dist.ops.attention.documents import locate_documents
from gptoss_dist.ops.attention.sink_attention import sink_attention
from gptoss_dist.parallel.context import Part
from gptoss_dist.parallel.exchange import Exchange
from gptoss_dist.parallel.traffic import SentBytes

B, H, K, C, SCALE = 2, 4, 2, 8, 0.3
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One attention."""

    tokens: int
    window: int | None = None
    documents: bool = False
    dtype: str = "float64"
    backend: str = "auto"

    @property
    def name(self) -> str:
        """The case in words."""
        return " ".join(f"{key}={value}" for key, value in dataclasses.asdict(self).items())


def inputs(case: AttentionCase) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Return q, k, v and sinks of the whole sequence, the gradient of its output, and its documents."""
    generator = torch.Generator().manual_seed(case.tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DTYPES[case.dtype])

    T = case.tokens
    tensors = [draw(B, H, T, C), draw(B, K, T, C), draw(B, K, T, C), draw(H)]
    ids_BT = None
    if case.documents:
        starts_BT = torch.rand(B, T, generator=generator) < 4 / T
        starts_BT[0] &= False  # a single document
        ids_BT = starts_BT.cumsum(1)
    return tensors, draw(B, H, T, C), ids_BT


def differentiate(function, tensors: list[Tensor], do_BHTC: Tensor) -> list[Tensor]:
    """Return the output and the gradients of all tensors."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    o_BHTC = function(*leaves)
    return [o_BHTC.detach(), *torch.autograd.grad(o_BHTC, leaves, do_BHTC)]


def compare(case: AttentionCase, ranks: Ranks) -> dict:
    """Return how far the parts are off the whole, relative to its largest value, and the bytes that were sent."""
    (q, k, v, sinks), do_BHTC, ids_BT = inputs(case)
    documents = None if ids_BT is None else locate_documents(ids_BT)
    options = {"scale": SCALE, "window": case.window, "backend": case.backend}
    expected = differentiate(
        lambda *tensors: sink_attention(*tensors, documents=documents, **options), [q, k, v, sinks], do_BHTC
    )
    exchange = Exchange(dist.group.WORLD, ranks.device)
    part = Part(torch.zeros(B, case.tokens, dtype=torch.int64), ids_BT, exchange, {case.window})
    sent = SentBytes()
    with sent.counting():
        found = differentiate(
            lambda *tensors: part.attend(*tensors, **options),
            [*(x[:, :, part.position_T] for x in (q, k, v)), sinks],
            do_BHTC[:, :, part.position_T],
        )
    dsinks_H = ranks.sum(found.pop().double())
    errors = [(dsinks_H - expected[-1]).abs().max() / expected[-1].abs().max()]
    for whole, mine in zip(expected, found):
        if mine.numel():
            errors.append((whole[:, :, part.position_T] - mine).abs().max() / whole.abs().max())
    return {"error": float(max(errors)), "sent": sent.by_name.get("alltoall_base_", 0)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = init_distributed()
    cases = [AttentionCase(**values) for values in json.loads(Path(sys.argv[1]).read_text())]
    results = {case.name: compare(case, ranks) for case in cases}
    (Path(sys.argv[2]) / f"{ranks.rank}.json").write_text(json.dumps(results))
    shut_down()
