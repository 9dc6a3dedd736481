"""Full attention of a sequence that is split over processes: keys and values go round in a ring (arXiv:2310.01889).

Each of N processes has two chunks of the sequence, r and 2 N - 1 - r of 2 N, so that all have as much to compute:

    chunk of the sequence    0  1  2  3  4  5  6  7        N = 4
    process                  0  1  2  3  3  2  1  0

Its own keys and values stay with their queries; then those of process r - 1 arrive, of r - 2, and so on, while it sends
what it had to r + 1. What it computes of those of process s is, for every s, two blocks without a mask:

    its later chunk with s's earlier one, and    its earlier chunk with s's earlier one if s < r,
                                                 its later chunk with s's later one if s > r.

The blocks are added up by their log-sum-exps (`ops/attention/blocks.py`), beginning with a chunk's attention to itself,
in which the sinks are counted, once. The backward pass sends keys and values round again, and with them the sum of
their gradients, which is back home after N steps. Beside its own a process holds up to
three such blocks: what it sends, what it computes with, what it receives.

Shapes: B batch, T tokens of this process, S tokens of another one, H query heads, K key/value heads, C head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptoss_dist.ops.attention.blocks import block_attention, block_attention_backward
from gptoss_dist.ops.attention.documents import Documents
from gptoss_dist.ops.attention.kernel_op import attend_with_lse, differentiate
from gptoss_dist.parallel.recompute import once


class Chunk(NamedTuple):
    """A run of tokens of the whole sequence: positions start ... stop - 1."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


@dataclass(frozen=True)
class Split:
    """Which process has which chunks of a sequence.

    Chunks differ by one token at the most, and none is empty: there are at least as many tokens as chunks.
    """

    tokens: int
    """Of the whole sequence."""
    size: int
    """Processes, N."""

    def chunk(self, index: int) -> Chunk:
        """Return the chunk of this index, of 2 N."""
        each, more = divmod(self.tokens, 2 * self.size)
        start = index * each + min(index, more)
        return Chunk(start, start + each + (index < more))

    def chunks(self, rank: int) -> tuple[Chunk, Chunk]:
        """Return the earlier and the later chunk of a process."""
        return self.chunk(rank), self.chunk(2 * self.size - 1 - rank)

    def tokens_of(self, rank: int) -> int:
        """Return the number of tokens of a process."""
        return sum(chunk.size for chunk in self.chunks(rank))


class Ring(NamedTuple):
    """A split, and this process's place in it."""

    split: Split
    rank: int
    """Of this process in its group."""
    group: dist.ProcessGroup
    documents: tuple[Documents | None, Documents | None]
    """Where documents lie within each of its chunks."""
    first_BT: tuple[Tensor | None, Tensor | None]
    """Position in the whole sequence of the first token of the document of each token of each of its chunks."""

    @property
    def own(self) -> tuple[slice, slice]:
        """Where its two chunks lie among its tokens."""
        return _places(self.split, self.rank)

    def source(self, step: int) -> int:
        """Return the process whose keys and values are here in a step."""
        return (self.rank - step) % self.split.size

    def pass_on(self, rows: Tensor, step: int) -> _Passing:
        """Send what is here in a step to the next process, and begin to receive what is here in the next step.

        Args:
            rows: What is here, a row for each token of the process it came from.
            step: Of the ring, 0 ... N - 1.
        """
        size = self.split.size
        received = rows.new_empty(self.split.tokens_of(self.source(step + 1)), *rows.shape[1:])
        sent, arriving = [0] * size, [0] * size
        sent[(self.rank + 1) % size], arriving[self.rank - 1] = rows.shape[0], received.shape[0]
        work = dist.all_to_all_single(received, rows, arriving, sent, group=self.group, async_op=True)
        return _Passing(work, rows, received)

    def blocks(self, step: int) -> Iterator[tuple[int, slice, Tensor | None]]:
        """List what this process computes in a step besides its chunks' attention to themselves.

        Yields:
            Which of its chunks attends, to which rows of what is here, and the first of these rows that each query
            sees, or None if it sees all.
        """
        source = self.source(step)
        pairs = [(1, 0), *([(0, 0)] if source < self.rank else []), *([(1, 1)] if source > self.rank else [])]
        for mine, theirs in pairs:
            chunk, first_BT = self.split.chunks(source)[theirs], self.first_BT[mine]
            first_BT = None if first_BT is None else (first_BT - chunk.start).clamp(min=0)
            yield mine, _places(self.split, source)[theirs], first_BT


class _Passing(NamedTuple):
    """Rows on their way round the ring."""

    work: dist.Work
    sent: Tensor
    """Kept until they have left."""
    received: Tensor

    def wait(self) -> Tensor:
        """Return what was received; on CUDA the device waits for it, not the host."""
        self.work.wait()
        return self.received


def _places(split: Split, rank: int) -> tuple[slice, slice]:
    early, late = (chunk.size for chunk in split.chunks(rank))
    return slice(0, early), slice(early, early + late)


def ring_attention(
    q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, sinks_H: Tensor, ring: Ring, scale: float, kernel: str
) -> Tensor:
    """Return causal attention of this process's queries to the whole sequence, [B, H, T, C]; collective.

    Args:
        q_BHTC: Queries of its two chunks, one behind the other.
        k_BKTC: Keys of its chunks.
        v_BKTC: Values of its chunks.
        sinks_H: One logit per query head.
        ring: The split, and who this process is.
        scale: Factor on q . k.
        kernel: From `ops.attention.blocks.block_kernel`.
    """
    q_BTHC, k_BTKC, v_BTKC = (x.transpose(1, 2) for x in (q_BHTC, k_BKTC, v_BKTC))
    return _RingAttention.apply(q_BTHC, k_BTKC, v_BTKC, sinks_H, ring, scale, kernel).transpose(1, 2)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BTHC, k_BTKC, v_BTKC, sinks_H, ring, scale, kernel):
        o_BTHC, lse_HBT = once(lambda: _forward(q_BTHC, k_BTKC, v_BTKC, sinks_H, ring, scale, kernel), large=True)
        ctx.save_for_backward(q_BTHC, k_BTKC, v_BTKC, sinks_H, o_BTHC, lse_HBT)
        ctx.ring, ctx.scale, ctx.kernel = ring, scale, kernel
        # Autograd writes the graph's node into the tensor returned here; what is kept shares its memory only.
        return o_BTHC.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, do_BTHC):
        return *_backward(do_BTHC.contiguous(), *ctx.saved_tensors, ctx.ring, ctx.scale, ctx.kernel), None, None, None


def _forward(q_BTHC, k_BTKC, v_BTKC, sinks_H, ring: Ring, scale: float, kernel: str) -> tuple[Tensor, Tensor]:
    """Return o_BTHC in q's dtype, and lse_HBT, with the sinks counted in."""
    B, T, H, _ = q_BTHC.shape
    exact = torch.promote_types(q_BTHC.dtype, torch.float32)
    o_BTHC, lse_HBT = q_BTHC.new_empty(q_BTHC.shape, dtype=exact), q_BTHC.new_empty((H, B, T), dtype=exact)
    kv_SB2KC = _packed(k_BTKC, v_BTKC)
    passing = None
    for step in range(ring.split.size):
        if passing is not None:
            kv_SB2KC = passing.wait()
        passing = ring.pass_on(kv_SB2KC, step) if step + 1 < ring.split.size else None
        if step == 0:
            for own, documents in zip(ring.own, ring.documents):
                q, k, v = (x[:, own] for x in (q_BTHC, k_BTKC, v_BTKC))
                o, lse_HN = attend_with_lse(q, k, v, sinks_H, scale, documents, kernel)
                o_BTHC[:, own], lse_HBT[:, :, own] = o, lse_HN.view(H, B, -1)
        for mine, rows, first_BT in ring.blocks(step):
            own = ring.own[mine]
            k_BSKC, v_BSKC = _unpacked(kv_SB2KC[rows])
            o, lse = block_attention(q_BTHC[:, own], k_BSKC, v_BSKC, first_BT, scale, kernel)
            _add_block(o_BTHC[:, own], lse_HBT[:, :, own], o, lse)
    return o_BTHC.to(q_BTHC.dtype), lse_HBT


def _add_block(o_BTHC: Tensor, lse_HBT: Tensor, o_more_BTHC: Tensor, lse_more_HBT: Tensor) -> None:
    """Add a block to a sum of blocks, in place."""
    sum_HBT = torch.logaddexp(lse_HBT, lse_more_HBT)
    before_BTH1, more_BTH1 = (torch.exp(x - sum_HBT).permute(1, 2, 0)[..., None] for x in (lse_HBT, lse_more_HBT))
    o_BTHC.mul_(before_BTH1).addcmul_(o_more_BTHC, more_BTH1)
    lse_HBT.copy_(sum_HBT)


def _backward(do_BTHC, q_BTHC, k_BTKC, v_BTKC, sinks_H, o_BTHC, lse_HBT, ring: Ring, scale: float, kernel: str):
    """Return the gradients of q, k, v and sinks, each in its dtype."""
    exact = lse_HBT.dtype
    exact_sinks_H = sinks_H.to(exact)
    dq_BTHC, dsinks_H = q_BTHC.new_zeros(q_BTHC.shape, dtype=exact), torch.zeros_like(exact_sinks_H)
    kv_SB2KC = _packed(k_BTKC, v_BTKC)
    passing = passing_gradients = None
    for step in range(ring.split.size):
        if passing is not None:
            kv_SB2KC = passing.wait()
        passing = ring.pass_on(kv_SB2KC, step) if step + 1 < ring.split.size else None
        dkv_SB2KC = kv_SB2KC.new_zeros(kv_SB2KC.shape, dtype=exact)
        for mine, rows, first_BT in ring.blocks(step):
            own = ring.own[mine]
            do, q, o = (x[:, own] for x in (do_BTHC, q_BTHC, o_BTHC))
            k_BSKC, v_BSKC = _unpacked(kv_SB2KC[rows])
            lse = lse_HBT[:, :, own].contiguous()
            dq, dk, dv = block_attention_backward(do, q, k_BSKC, v_BSKC, o, lse, first_BT, scale, kernel)
            dq_BTHC[:, own] += dq
            dkv_SB2KC[rows] += _packed(dk, dv)
        if step == 0:
            for own, documents in zip(ring.own, ring.documents):
                do, q, k, v, o = (x[:, own] for x in (do_BTHC, q_BTHC, k_BTKC, v_BTKC, o_BTHC))
                lse_HN = lse_HBT[:, :, own].flatten(1)
                dq, dk, dv, dsinks = differentiate(do, (q, k, v, exact_sinks_H), o, lse_HN, scale, documents, kernel)
                dq_BTHC[:, own] += dq
                dkv_SB2KC[own] += _packed(dk, dv)
                dsinks_H += dsinks
        if passing_gradients is not None:
            dkv_SB2KC += passing_gradients.wait()
        passing_gradients = ring.pass_on(dkv_SB2KC, step)
    assert passing_gradients is not None, "a ring has two processes at least"
    dk_BTKC, dv_BTKC = _unpacked(passing_gradients.wait())
    found = zip((dq_BTHC, dk_BTKC, dv_BTKC, dsinks_H), (q_BTHC, k_BTKC, v_BTKC, sinks_H))
    return tuple(gradient.to(x.dtype) for gradient, x in found)


def _packed(k_BTKC: Tensor, v_BTKC: Tensor) -> Tensor:
    """Return keys and values as one block of rows that can be sent, [T, B, 2, K, C]."""
    return torch.stack((k_BTKC.transpose(0, 1), v_BTKC.transpose(0, 1)), dim=2)


def _unpacked(kv_TB2KC: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `_packed`: two views."""
    k_TBKC, v_TBKC = kv_TB2KC.unbind(2)
    return k_TBKC.transpose(0, 1), v_TBKC.transpose(0, 1)
