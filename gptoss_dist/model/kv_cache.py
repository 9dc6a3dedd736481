"""Keys and values of earlier tokens. Layers with a sliding window keep that window, full layers keep everything.

Shapes: B batch, K key/value heads, C head_dim, T new tokens, S tokens to attend to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptoss_dist.model.config import SLIDING, ModelConfig


class KVCache:
    """Cache of a whole model. `length` is the number of tokens seen; the model advances it after each forward pass.

    Args:
        config: The architecture.
        padding: Tokens of padding with which each row begins, which nothing attends to: prompts of different lengths
            end together. None if there is none anywhere.
    """

    def __init__(self, config: ModelConfig, *, padding: Sequence[int] | None = None) -> None:
        self.length = 0
        first = tuple(padding) if padding is not None and any(padding) else None
        self.layers: list[FullCache | SlidingCache] = [
            SlidingCache(config.sliding_window, first) if kind == SLIDING else FullCache(first)
            for kind in config.attention_types
        ]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order; a row that is named more than once is copied."""
        for layer in self.layers:
            layer.select(rows)

    def nbytes(self) -> int:
        """Return the bytes held now, over all layers."""
        return sum(layer.nbytes() for layer in self.layers)


class FullCache:
    """Cache of a full layer, in buffers that double when they are full, so that appending T tokens costs O(T)."""

    def __init__(self, first: tuple[int, ...] | None = None) -> None:
        self.length, self.first = 0, first
        self.buffers: tuple[Tensor, Tensor] | None = None

    def append(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store new keys and values; arguments and results are those of `attention.LayerCache.append`."""
        old, self.length = self.length, self.length + k_BKTC.shape[2]
        k_held, v_held = self.buffers or (None, None)
        self.buffers = (self._with_room(k_held, k_BKTC, old), self._with_room(v_held, v_BKTC, old))
        for buffer, new in zip(self.buffers, (k_BKTC, v_BKTC)):
            buffer[:, :, old : self.length] = new
        if old == 0 and self.first is None:
            return k_BKTC, v_BKTC, None
        k_BKSC, v_BKSC = (buffer[:, :, : self.length] for buffer in self.buffers)
        query_T1 = torch.arange(old, self.length, device=k_BKTC.device)[:, None]
        return k_BKSC, v_BKSC, _behind_padding(torch.arange(self.length, device=k_BKTC.device) <= query_T1, self.first)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows."""
        self.buffers, self.first = _selected(self.buffers, rows), _selected_first(self.first, rows)

    def _with_room(self, held: Tensor | None, new: Tensor, old: int) -> Tensor:
        if held is not None and self.length <= held.shape[2]:
            return held
        B, K, _, C = new.shape
        buffer = new.new_empty(B, K, max(64, 2 * self.length), C)
        if held is not None:
            buffer[:, :, :old] = held[:, :, :old]
        return buffer

    def nbytes(self) -> int:
        """Return the bytes held now."""
        return sum(b.nbytes for b in self.buffers or ())


class SlidingCache:
    """Cache of a layer with a sliding window: the last `window` keys and values, since no query sees an older one."""

    def __init__(self, window: int, first: tuple[int, ...] | None = None) -> None:
        self.window, self.first, self.length = window, first, 0
        self.held: tuple[Tensor, Tensor] | None = None

    def append(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store new keys and values, after the new tokens saw the old ones; as `attention.LayerCache.append`."""
        visible_TS, held = None, 0
        self.length += k_BKTC.shape[2]
        if self.held is not None or self.first is not None:
            if self.held is not None:
                held = self.held[0].shape[2]
                k_BKTC, v_BKTC = torch.cat((self.held[0], k_BKTC), dim=2), torch.cat((self.held[1], v_BKTC), dim=2)
            S, device = k_BKTC.shape[2], k_BKTC.device
            distance_TS = torch.arange(held, S, device=device)[:, None] - torch.arange(S, device=device)
            visible_TS = (distance_TS >= 0) & (distance_TS < self.window)
            first = None if self.first is None else tuple(first - (self.length - S) for first in self.first)
            visible_TS = _behind_padding(visible_TS, first)
        # A view of the prefill would keep all of it alive, therefore clone.
        self.held = (k_BKTC[:, :, -self.window :].clone(), v_BKTC[:, :, -self.window :].clone())
        return k_BKTC, v_BKTC, visible_TS

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows."""
        self.held, self.first = _selected(self.held, rows), _selected_first(self.first, rows)

    def nbytes(self) -> int:
        """Return the bytes held now."""
        return sum(x.nbytes for x in self.held or ())


def _behind_padding(visible_TS: Tensor, first: tuple[int, ...] | None) -> Tensor:
    """Return a mask that also hides each row's padding, [B, T, S]; the same one if there is none."""
    if first is None:
        return visible_TS
    first_B11 = torch.tensor(first, device=visible_TS.device)[:, None, None]
    return visible_TS & (torch.arange(visible_TS.shape[1], device=visible_TS.device) >= first_B11)


def _selected(held: tuple[Tensor, Tensor] | None, rows: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    if held is None:
        return None
    index = torch.tensor(rows, device=held[0].device)
    return held[0].index_select(0, index), held[1].index_select(0, index)


def _selected_first(first: tuple[int, ...] | None, rows: Sequence[int]) -> tuple[int, ...] | None:
    return None if first is None else tuple(first[row] for row in rows)
