"""Where the documents of a batch lie: found once for a forward pass, and handed to every layer's attention.

    ids    0 0 0 5 5 9        (one sequence of six tokens, three documents)
    first  0 0 0 3 3 5        (where each token's document begins)
    cu_seqlens  0 3 5 6       (where documents begin in the flattened batch, and its end)
    longest  3

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """The borders of the documents in the two forms that kernels ask for."""

    first_BT: Tensor
    """Position within its sequence of the first token of each token's document, int64."""
    cu_seqlens: Tensor
    """Start of every document in the flattened batch, and B * T last: [documents + 1], int32."""
    longest: int
    """Length of the longest document."""


@torch.compiler.disable
def locate_documents(document_ids_BT: Tensor) -> Documents:
    """Find the documents of a batch. The host waits for the device here, once, so do it once for all layers.

    Args:
        document_ids_BT: Integers, non-decreasing along T; equal ids of a sequence are one document.

    Raises:
        ValueError: There is another number of dimensions, or ids decrease.
    """
    return locate_documents_of_runs(document_ids_BT, [(0, document_ids_BT.shape[-1])])[1][0]


@torch.compiler.disable
def locate_documents_of_runs(
    document_ids_BT: Tensor, runs: Sequence[tuple[int, int]]
) -> tuple[Tensor, list[Documents]]:
    """Find the documents of runs of tokens, as if each run were the batch. The host waits for the device once for all.

    Args:
        document_ids_BT: Those of the whole sequences, as for `locate_documents`.
        runs: First token of each run, and the one behind its last.

    Returns:
        `first_BT` of the whole sequences, and the documents of each run.

    Raises:
        ValueError: As `locate_documents`.
    """
    if document_ids_BT.dim() != 2:
        raise ValueError(f"document_ids_BT has shape {tuple(document_ids_BT.shape)}; need [B, T]")
    T = document_ids_BT.shape[1]
    step_BT = document_ids_BT.diff(dim=1)
    position_T = torch.arange(T, device=document_ids_BT.device)
    first_BT = torch.zeros_like(document_ids_BT, dtype=torch.int64)
    first_BT[:, 1:] = torch.where(step_BT > 0, position_T[1:], 0).cummax(dim=1).values
    firsts = [
        first_BT if (start, stop) == (0, T) else (first_BT[:, start:stop] - start).clamp(min=0) for start, stop in runs
    ]
    starts = [(first == position_T[: first.shape[1]]).flatten() for first in firsts]
    sizes = [(step_BT < 0).any().long()]
    for first, starts_N in zip(firsts, starts):
        sizes += [starts_N.sum(), (position_T[: first.shape[1]] - first).max() + 1]
    decreases, *counts = torch.stack(sizes).tolist()
    if decreases:
        raise ValueError("document_ids_BT decreases along T; number the documents of a sequence in order")
    found = []
    for first, starts_N, count, longest in zip(firsts, starts, counts[::2], counts[1::2]):
        places = torch.nonzero_static(starts_N, size=count).flatten()  # nonzero would ask the device for the size again
        cu_seqlens = torch.nn.functional.pad(places, (0, 1), value=first.numel())
        found.append(Documents(first, cu_seqlens.int(), longest))
    return first_BT, found


def padded_documents(firsts: Sequence[int], T: int, device: torch.device) -> Documents | None:
    """Return where text and the padding before it lie, as two documents of each row, or None if there is no padding.

    The host knows the numbers, so that it does not wait for the device.

    Args:
        firsts: Where the text of each row begins; at 0 or below it fills the row, at T or beyond there is none.
        T: The length of the rows.
        device: Where the result is to be.
    """
    firsts = [min(max(first, 0), T) for first in firsts]
    if not any(firsts):
        return None
    starts = [row * T + start for row, first in enumerate(firsts) for start in {0, first % T}]
    longest = max(max(first, T - first) for first in firsts)
    first_B1 = torch.tensor(firsts, device=device)[:, None]
    first_BT = torch.where(torch.arange(T, device=device) >= first_B1, first_B1, 0)
    cu_seqlens = torch.tensor([*sorted(starts), len(firsts) * T], dtype=torch.int32, device=device)
    return Documents(first_BT, cu_seqlens, longest)
