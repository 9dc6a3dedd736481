"""Context parallelism: a sequence that is longer than one device holds, split over processes.

The processes of a context group have the same samples. `split_sequences` makes the model take its own part of each,
compute on that, and return the part's share of the loss; everything but attention is a matter of single tokens anyway.
Attention asks a `SequencePart`: full layers send keys and values round in a ring (`ring.py`); sliding layers fetch the
last `window - 1` keys and values before each of the two chunks of this process, its *halo*:

    chunk           0      1      2      3      4      5      6      7          N = 4
    process         0      1      2      3      3      2      1      0
    halo of 5                               <---|from process 3

A chunk with its halo in front is a short sequence of its own, for the kernels that serve any other. The halo's queries
are zeros, whose results are dropped. Where chunks are shorter than the window, a halo comes from several processes.

Shapes: B batch, T tokens of this process or of the whole sequence, H query heads, K key/value heads, C head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from gptoss_dist.model.moe import RouterStats
from gptoss_dist.model.transformer import GptOss, LossSums
from gptoss_dist.ops.attention.blocks import block_kernel
from gptoss_dist.ops.attention.documents import Documents, locate_documents_of_runs
from gptoss_dist.ops.attention.sink_attention import sink_attention
from gptoss_dist.parallel.exchange import Exchange
from gptoss_dist.parallel.ring import Chunk, Ring, Split, ring_attention


def split_sequences(model: GptOss, mesh: DeviceMesh) -> None:
    """Let `model`, called with labels, compute this process's part of each sequence only; in place.

    It is still given whole samples, the same ones on all processes of the mesh, and its sums are this part's share.
    Without labels, and for the loss of each token, it does as before: every process computes all of it.

    Args:
        model: The model, before it is sharded.
        mesh: One-dimensional, of the processes that share each sequence.
    """
    exchange = Exchange(mesh.get_group(), torch.device(mesh.device_type))
    exchange.counting = False  # nobody takes its times
    windows = {layer.self_attn.window for layer in model.blocks}
    model.forward = functools.partial(_forward, model.forward, exchange, windows)  # type: ignore[method-assign]


def _forward(
    whole: Callable[..., Any],
    exchange: Exchange,
    windows: set[int | None],
    input_ids_BT: Tensor,
    labels_BT: Tensor | None = None,
    *,
    document_ids_BT: Tensor | None = None,
    per_token: bool = False,
    **kwargs,
) -> Any:
    if labels_BT is None or per_token:
        return whole(input_ids_BT, labels_BT, document_ids_BT=document_ids_BT, per_token=per_token, **kwargs)
    if input_ids_BT.shape[1] < 2 * exchange.size:  # fewer tokens than chunks: all compute it, and take equal shares
        sums = whole(input_ids_BT, labels_BT, document_ids_BT=document_ids_BT, **kwargs)
        return LossSums(sums.token_loss / exchange.size, RouterStats(*(x / exchange.size for x in sums.stats)))
    part = Part(input_ids_BT, document_ids_BT, exchange, windows)
    return whole(part.of(input_ids_BT), part.of(labels_BT), part=part, **kwargs)


class Halo(NamedTuple):
    """What one process sends and receives so that each of its chunks has the tokens right before it."""

    rows: list[slice]
    """Which of its tokens it sends, in the order of the processes that they go to."""
    sent: list[int]
    """How many go to each process; some may go to itself."""
    received: list[int]
    """How many come from each process."""
    places: tuple[list[slice], list[slice]]
    """Where, among those received, the tokens before each of its chunks are, in the order of their positions."""


@functools.lru_cache(maxsize=256)
def plan_halo(split: Split, rank: int, window: int) -> Halo:
    """Return the exchange of one process for a sliding layer.

    Args:
        split: Who has which chunks.
        rank: The process, in its group.
        window: How many keys a query sees, itself included.
    """

    def pieces(source: int, target: int) -> list[tuple[int, Chunk, int]]:
        """List what `source` sends to `target`: for which of its chunks, which positions, and at which of its rows."""
        found = []
        for which, chunk in enumerate(split.chunks(target)):
            halo = halo_before(chunk, window)
            row = 0
            for own in split.chunks(source):
                piece = Chunk(max(own.start, halo.start), min(own.stop, halo.stop))
                if piece.size > 0:
                    found.append((which, piece, row + piece.start - own.start))
                row += own.size
        return found

    leaving = [pieces(rank, target) for target in range(split.size)]
    arriving = [pieces(source, rank) for source in range(split.size)]
    places: tuple[list, list] = ([], [])
    row = 0
    for which, piece, _ in (piece for from_one in arriving for piece in from_one):
        places[which].append((piece.start, slice(row, row + piece.size)))
        row += piece.size
    return Halo(
        [slice(row, row + piece.size) for to_one in leaving for _, piece, row in to_one],
        [sum(piece.size for _, piece, _ in to_one) for to_one in leaving],
        [sum(piece.size for _, piece, _ in from_one) for from_one in arriving],
        tuple([place for _, place in sorted(found, key=lambda p: p[0])] for found in places),  # type: ignore[arg-type]
    )


def halo_before(chunk: Chunk, window: int) -> Chunk:
    """Return the positions before a chunk that its queries see through a window."""
    return Chunk(max(0, chunk.start - (window - 1)), chunk.start)


class Part:
    """This process's part of each sequence of a batch (`model.attention.SequencePart`), for one forward pass."""

    def __init__(
        self,
        input_ids_BT: Tensor,
        document_ids_BT: Tensor | None,
        exchange: Exchange,
        windows: set[int | None],
    ) -> None:
        """Find the part of this process.

        Args:
            input_ids_BT: The whole sequences.
            document_ids_BT: Their documents, as for `GptOss.forward`.
            exchange: What reaches the other processes.
            windows: Those of all layers, for which documents are located here, once.
        """
        tokens = input_ids_BT.shape[1]
        self.exchange, self.rank = exchange, dist.get_rank(exchange.group)
        self.split = Split(tokens, exchange.size)
        self.chunks = self.split.chunks(self.rank)
        self.position_T = torch.cat([torch.arange(*chunk, device=input_ids_BT.device) for chunk in self.chunks])
        runs = list(dict.fromkeys(self._run(window, chunk) for window in windows for chunk in self.chunks))
        first_BT, self._documents = None, dict[Chunk, Documents | None].fromkeys(runs)
        if document_ids_BT is not None:
            first_BT, located = locate_documents_of_runs(document_ids_BT, runs)
            self._documents.update(zip(runs, located))
        early, late = self.chunks
        self.ring = Ring(
            self.split,
            self.rank,
            exchange.group,
            (self._documents.get(early), self._documents.get(late)),
            (None, None) if first_BT is None else (first_BT[:, slice(*early)], first_BT[:, slice(*late)]),
        )

    def of(self, x_BT: Tensor) -> Tensor:
        """Return this process's tokens of something that all processes have whole."""
        return torch.cat([x_BT[:, slice(*chunk)] for chunk in self.chunks], dim=1)

    def _run(self, window: int | None, chunk: Chunk) -> Chunk:
        """Return the positions that the attention of a chunk computes on in one go."""
        is_sliding = window is not None and window < self.split.tokens
        return Chunk(halo_before(chunk, window).start, chunk.stop) if is_sliding and window is not None else chunk

    @torch.compiler.disable  # collectives, which break the graph wherever they are
    def attend(
        self,
        q_BHTC: Tensor,
        k_BKTC: Tensor,
        v_BKTC: Tensor,
        sinks_H: Tensor,
        *,
        scale: float,
        window: int | None,
        backend: str,
    ) -> Tensor:
        """Return causal attention of this part's queries to the whole sequences; see the protocol. Collective."""
        if window is None or window >= self.split.tokens:
            kernel = block_kernel(backend, q_BHTC.transpose(1, 2))
            return ring_attention(q_BHTC, k_BKTC, v_BKTC, sinks_H, self.ring, scale, kernel)
        return self._slide(q_BHTC, k_BKTC, v_BKTC, sinks_H, scale, window, backend)

    def _slide(self, q_BHTC, k_BKTC, v_BKTC, sinks_H, scale: float, window: int, backend: str) -> Tensor:
        halo = plan_halo(self.split, self.rank, window)
        kv_TB2KC = torch.stack((k_BKTC, v_BKTC)).permute(3, 1, 0, 2, 4)
        # All processes send and receive some, or none do (a window of 1): gradients go back where rows came from.
        sent = torch.cat([kv_TB2KC[:0], *(kv_TB2KC[rows] for rows in halo.rows)])
        received_MB2KC = self.exchange.rows(sent, halo.sent, halo.received)
        results, begin = [], 0
        for chunk, places in zip(self.chunks, halo.places):
            own, begin = slice(begin, begin + chunk.size), begin + chunk.size
            kv_SB2KC = torch.cat([*(received_MB2KC[rows] for rows in places), kv_TB2KC[own]])
            k_BKSC, v_BKSC = kv_SB2KC.permute(2, 1, 3, 0, 4)
            before = kv_SB2KC.shape[0] - chunk.size
            o_BHSC = sink_attention(
                torch.nn.functional.pad(q_BHTC[:, :, own], (0, 0, before, 0)),
                k_BKSC,
                v_BKSC,
                sinks_H,
                scale=scale,
                window=window,
                documents=self._documents[self._run(window, chunk)],
                backend=backend,
            )
            results.append(o_BHSC[:, :, before:])
        return torch.cat(results, dim=2)
