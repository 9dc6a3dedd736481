"""Where the documents of a batch lie: found once for a forward pass, and handed to every layer's attention.

    ids    0 0 0 5 5 9        (one sequence of six tokens, three documents)
    first  0 0 0 3 3 5        (where each token's document begins)
    cu_seqlens  0 3 5 6       (where documents begin in the flattened batch, and its end)
    longest  3

Shapes: B batch, T tokens.
"""

from __future__ import annotations

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
    if document_ids_BT.dim() != 2:
        raise ValueError(f"document_ids_BT has shape {tuple(document_ids_BT.shape)}; need [B, T]")
    B, T = document_ids_BT.shape
    step_BT = document_ids_BT.diff(dim=1)
    position_T = torch.arange(T, device=document_ids_BT.device)
    first_BT = torch.zeros_like(document_ids_BT, dtype=torch.int64)
    first_BT[:, 1:] = torch.where(step_BT > 0, position_T[1:], 0).cummax(dim=1).values
    starts_N = (first_BT == position_T).flatten()
    longest = (position_T - first_BT).max() + 1
    decreases, count, longest = torch.stack([(step_BT < 0).any().long(), starts_N.sum(), longest]).tolist()
    if decreases:
        raise ValueError("document_ids_BT decreases along T; number the documents of a sequence in order")
    starts = torch.nonzero_static(starts_N, size=count).flatten()  # nonzero would ask the device for the size again
    cu_seqlens = torch.nn.functional.pad(starts, (0, 1), value=B * T)
    return Documents(first_BT, cu_seqlens.int(), longest)
