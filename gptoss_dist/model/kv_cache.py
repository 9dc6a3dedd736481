"""Keys and values of earlier tokens. Layers with a sliding window keep that window, full layers keep everything.

Prompts of different lengths form one batch if they end together: shorter ones begin with padding.

    column      0 1 2 3 4 | 5       (two prompts, of five tokens and of three, and one new token each)
    row 0       a b c d e | f       positions 0 1 2 3 4 | 5
    row 1       - - x y z | w       positions     0 1 2 | 3

So every row writes to the same columns, which keeps writing a copy and attention a mask of column numbers. A sliding
layer holds the last W columns in a ring, column c in slot c % W. Padding comes before the text of its row: it never
takes the place of a key that is still seen, and nothing attends to it.

All layers of a kind do the same in a forward pass. What they need to know is found once, in `KVCache.advance`.

Shapes: B batch, T new tokens, S tokens to attend to, H query heads, K key/value heads, C head_dim, W sliding_window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss_dist.model.config import SLIDING, ModelConfig
from gptoss_dist.ops.attention.behind import (
    full_attention_behind,
    visible_behind,
    windowed_attention_behind,
)
from gptoss_dist.ops.attention.documents import Documents, padded_documents
from gptoss_dist.ops.attention.one_token import one_token_attention
from gptoss_dist.ops.attention.sink_attention import masked_sink_attention, sink_attention

FEW_SCORES = 1 << 20
"""Up to so many scores (B * H * T * S), a mask over all of them is cheaper than tiles."""
ROOM = 64
"""Columns of a growing buffer at first."""


class KVCache:
    """Cache of a whole model, for inference: what goes through it has no gradient.

    Args:
        config: The architecture.
        capacity: Columns for which full layers hold room from the beginning; None lets them grow.
        padding: Columns of padding with which each row begins; None if there is none anywhere.
        fixed_shapes: Make a step of one token a function of tensors whose shapes never change, with the column in a
            tensor on the device (`column_1`), so that it can be compiled once or captured in a CUDA graph. It then
            attends to the whole capacity, under a mask. Such a step is `advance` and the layers; a replayed graph
            advances `column_1` and not `length`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        capacity: int | None = None,
        padding: Sequence[int] | None = None,
        fixed_shapes: bool = False,
    ) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity={capacity} must be 1 or more, or None for a cache that grows")
        if fixed_shapes and capacity is None:
            raise ValueError("fixed_shapes=True needs a capacity: the most tokens that there will be")
        self.length = 0
        """Columns seen so far."""
        self.capacity, self.fixed_shapes = capacity, fixed_shapes
        self.padding = tuple(padding) if padding is not None and any(padding) else None
        self.column_1: Tensor | None = None
        self.heads = config.num_attention_heads
        self.window = min(config.sliding_window, capacity or config.sliding_window)
        """Slots of a ring. No window reaches beyond the capacity."""
        self._first_B: Tensor | None = None
        self.layers: list[FullCache | SlidingCache] = [
            SlidingCache(self.window, fixed_shapes) if kind == SLIDING else FullCache(capacity, fixed_shapes)
            for kind in config.attention_types
        ]
        self._shape = (config.num_key_value_heads, config.head_dim)

    def nbytes(self) -> int:
        """Return the bytes held now, over all layers."""
        return sum(layer.nbytes() for layer in self.layers)

    def allocate(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate everything at once; otherwise each layer does at its first keys. It needs a capacity."""
        assert self.capacity is not None
        K, C = self._shape
        for layer in self.layers:
            columns = self.window if isinstance(layer, SlidingCache) else self.capacity
            layer.allocate(torch.empty(batch_size, K, 0, C, dtype=dtype, device=device), columns)

    def advance(self, input_ids_BT: Tensor) -> tuple[Tensor, list[LayerStep]]:
        """Count in the tokens of a forward pass.

        Returns:
            The tokens' positions, [T], or [B, T] if they differ between rows; and what each layer's attention calls.

        Raises:
            ValueError: There is no room for so many tokens, there is another number of rows than there was, or
                gradients are enabled, which would be wrong.
        """
        if torch.is_grad_enabled():
            raise ValueError("a key/value cache has no gradient; call the model inside of torch.no_grad()")
        (B, T), device = input_ids_BT.shape, input_ids_BT.device
        self._check(B, T)
        if self._first_B is None and (self.padding is not None or self.fixed_shapes):
            self._first_B = torch.tensor(self.padding or (0,) * B, device=device)
        start, self.length = self.length, self.length + T
        if self.fixed_shapes:
            if self.column_1 is None:
                self.column_1 = torch.zeros(1, dtype=torch.int64, device=device)
            position_T = self.column_1 + torch.arange(T, device=device)
            step = self._fixed_step(self.column_1.clone()) if T == 1 else self._step(start, B, T, device)
            self.column_1 += T
        else:
            position_T, step = torch.arange(start, start + T, device=device), self._step(start, B, T, device)
        if self._first_B is not None:
            position_T = (position_T - self._first_B[:, None]).clamp_(min=0)
        return position_T, [LayerStep(layer, step) for layer in self.layers]

    def _check(self, B: int, T: int) -> None:
        if self.capacity is not None and self.length + T > self.capacity:
            raise ValueError(
                f"{T} tokens behind {self.length} do not fit into a cache of capacity={self.capacity}; give it more"
            )
        rows = [len(self.padding)] if self.padding is not None else [layer.rows for layer in self.layers[:1]]
        if rows[0] not in (None, B):
            raise ValueError(f"{B} rows do not fit into a cache of {rows[0]}")

    def _step(self, start: int, B: int, T: int, device: torch.device) -> Step:
        """Return what the layers do with T tokens behind `start` columns."""
        firsts, held = self.padding, min(start, self.window)
        from_ring = None if firsts is None else tuple(first - (start - held) for first in firsts)
        if start == 0:
            documents = None if firsts is None else padded_documents(firsts, T, device)
            return Step(0, T, firsts, self.window, full_documents=documents, sliding_documents=documents)
        step = Step(start, T, firsts, self.window)
        if T == 1:
            if firsts is not None:
                step.full_mask = visible_behind(1, start + 1, None, firsts, device)
                step.sliding_mask = self._ring_mask(torch.tensor([start], device=device))[..., : start + 1]
            return step
        if B * self.heads * T * (start + T) <= FEW_SCORES:
            step.full_mask = visible_behind(T, start + T, None, firsts, device)
        elif firsts is not None:
            step.full_documents = padded_documents([first - start for first in firsts], T, device)
        if B * self.heads * T * (held + T) <= FEW_SCORES:
            step.sliding_mask = visible_behind(T, held + T, self.window, from_ring, device)
        elif from_ring is not None:
            step.sliding_documents = padded_documents(from_ring, held + T, device)
        return step

    def _fixed_step(self, column_1: Tensor) -> Step:
        """Return the step of one token whose tensors have the same shapes with padding and without."""
        assert self.capacity is not None and self._first_B is not None
        step = Step(column_1, 1, None, self.window)
        key_S = torch.arange(self.capacity, device=column_1.device)
        visible_BS = (key_S <= column_1) & (key_S >= self._first_B[:, None])
        step.full_mask = visible_BS[:, None]
        step.sliding_mask = self._ring_mask(column_1)
        return step

    def _ring_mask(self, column_1: Tensor) -> Tensor:
        """Return which slots hold keys that the token in this column sees, bool [1 or B, 1, W]."""
        slot_W = torch.arange(self.window, device=column_1.device)
        column_W = column_1 - (column_1 - slot_W) % self.window
        first_B = self._first_B if self._first_B is not None else torch.zeros_like(column_1)
        return (column_W >= first_B[:, None])[:, None]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order; a row that is named more than once is copied."""
        for layer in self.layers:
            layer.select(rows)
        self._first_B = None
        if self.padding is not None:
            self.padding = tuple(self.padding[row] for row in rows)


@dataclass
class Step:
    """What all layers need to know of a forward pass."""

    start: int | Tensor
    """Columns before the new ones; a tensor [1] if shapes are fixed."""
    tokens: int
    """New columns, T."""
    firsts: tuple[int, ...] | None
    """The column in which the text of each row begins."""
    window: int
    """Slots of a ring."""
    full_mask: Tensor | None = None
    """Which keys are seen where this is decided by a mask, bool [T, S] or [B, T, S]; of one token None means all."""
    sliding_mask: Tensor | None = None
    """The same for what a sliding layer attends to: of one token the slots of the ring, else ring and chunk."""
    full_documents: Documents | None = None
    """Text and padding in the new columns, if there is any."""
    sliding_documents: Documents | None = None
    """Text and padding in the columns of the ring and the new ones."""


@dataclass(frozen=True)
class LayerStep:
    """What a layer's attention calls in a forward pass."""

    cache: FullCache | SlidingCache
    step: Step

    def attend(
        self, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, sinks_H: Tensor, *, scale: float, backend: str
    ) -> Tensor:
        """Store new keys and values; arguments and result are those of `attention.LayerCache.attend`."""
        return self.cache.attend(self.step, q_BHTC, k_BKTC, v_BKTC, sinks_H, scale=scale, backend=backend)


class _Buffers:
    """Keys and values of a layer, [B, K, columns, C] each.

    Args:
        zeroed: Whether a mask hides what was never written, instead of a slice: then it must be finite.
    """

    def __init__(self, zeroed: bool = False) -> None:
        self.zeroed = zeroed
        self.buffers: tuple[Tensor, Tensor] | None = None

    @property
    def rows(self) -> int | None:
        """How many sequences there are, None before the first."""
        return None if self.buffers is None else self.buffers[0].shape[0]

    def allocate(self, like_BKTC: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Allocate room for keys and values such as these."""
        B, K, _, C = like_BKTC.shape
        new = like_BKTC.new_zeros if self.zeroed else like_BKTC.new_empty
        self.buffers = (new(B, K, columns, C), new(B, K, columns, C))
        return self.buffers

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows."""
        if self.buffers is not None:
            index = torch.tensor(rows, device=self.buffers[0].device)
            k, v = self.buffers
            self.buffers = (k.index_select(0, index), v.index_select(0, index))

    def nbytes(self) -> int:
        """Return the bytes held now."""
        return sum(b.nbytes for b in self.buffers or ())


class FullCache(_Buffers):
    """Cache of a full layer. Without a capacity it doubles when it is full, so that appending T tokens costs O(T)."""

    def __init__(self, capacity: int | None = None, zeroed: bool = False) -> None:
        super().__init__(zeroed)
        self.capacity = capacity

    def attend(
        self, step: Step, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, sinks_H: Tensor, *, scale: float, backend: str
    ) -> Tensor:
        """Store new keys and values, and attend to all; see `attention.LayerCache.attend`."""
        if isinstance(step.start, Tensor):
            buffers = self.buffers or self.allocate(k_BKTC, self.capacity or ROOM)
            for buffer, new in zip(buffers, (k_BKTC, v_BKTC)):
                buffer.index_copy_(2, step.start, new)
            return one_token_attention(q_BHTC, *buffers, sinks_H, step.full_mask, scale=scale)
        start, end = step.start, step.start + step.tokens
        buffers = self._with_room(k_BKTC, end)
        for buffer, new in zip(buffers, (k_BKTC, v_BKTC)):
            buffer[:, :, start:end] = new
        if start == 0:
            return sink_attention(
                q_BHTC, k_BKTC, v_BKTC, sinks_H, scale=scale, documents=step.full_documents, backend=backend
            )
        k_BKSC, v_BKSC = (buffer[:, :, :end] for buffer in buffers)
        if step.tokens == 1:
            return one_token_attention(q_BHTC, k_BKSC, v_BKSC, sinks_H, step.full_mask, scale=scale)
        if step.full_mask is not None:
            return masked_sink_attention(q_BHTC, k_BKSC, v_BKSC, sinks_H, step.full_mask, scale=scale)
        return full_attention_behind(
            q_BHTC,
            k_BKTC,
            v_BKTC,
            k_BKSC[:, :, :start],
            v_BKSC[:, :, :start],
            sinks_H,
            scale=scale,
            firsts=step.firsts,
            documents=step.full_documents,
            backend=backend,
        )

    def _with_room(self, like_BKTC: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Return buffers that hold columns up to `end`, the old ones if they do."""
        held = self.buffers
        if held is None:
            return self.allocate(like_BKTC, self.capacity or max(ROOM, 2 * end))
        if end <= held[0].shape[2]:
            return held
        buffers = self.allocate(like_BKTC, 2 * end)
        for buffer, old in zip(buffers, held):
            buffer[:, :, : old.shape[2]] = old
        return buffers


class SlidingCache(_Buffers):
    """Cache of a layer with a sliding window: a ring of the last W keys and values. No query sees an older one."""

    def __init__(self, window: int, zeroed: bool = False) -> None:
        super().__init__(zeroed)
        self.window = window

    def attend(
        self, step: Step, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, sinks_H: Tensor, *, scale: float, backend: str
    ) -> Tensor:
        """Store new keys and values, and attend to those in the window; see `attention.LayerCache.attend`."""
        buffers = self.buffers or self.allocate(k_BKTC, self.window)
        if isinstance(step.start, Tensor):
            for buffer, new in zip(buffers, (k_BKTC, v_BKTC)):
                buffer.index_copy_(2, step.start % self.window, new)
            return one_token_attention(q_BHTC, *buffers, sinks_H, step.sliding_mask, scale=scale)
        if step.tokens == 1:
            self._write(step.start, k_BKTC, v_BKTC)
            k_BKSC, v_BKSC = (buffer[:, :, : step.start + 1] for buffer in buffers)
            return one_token_attention(q_BHTC, k_BKSC, v_BKSC, sinks_H, step.sliding_mask, scale=scale)
        # The chunk evicts keys that its first tokens see: copy them before it is written.
        k_BKSC, v_BKSC = (self._behind_ring(step.start, ring, new) for ring, new in zip(buffers, (k_BKTC, v_BKTC)))
        self._write(step.start, k_BKTC, v_BKTC)
        if step.sliding_mask is not None:
            return masked_sink_attention(q_BHTC, k_BKSC, v_BKSC, sinks_H, step.sliding_mask, scale=scale)
        attend = sink_attention if step.start == 0 else windowed_attention_behind
        return attend(
            q_BHTC,
            k_BKSC,
            v_BKSC,
            sinks_H,
            scale=scale,
            window=self.window,
            documents=step.sliding_documents,
            backend=backend,
        )

    def _behind_ring(self, start: int, ring_BKWC: Tensor, new_BKTC: Tensor) -> Tensor:
        """Return what the ring holds, in order, with new columns behind it."""
        if start == 0:
            return new_BKTC
        if start < self.window:
            return torch.cat((ring_BKWC[:, :, :start], new_BKTC), dim=2)
        oldest = start % self.window
        return torch.cat((ring_BKWC[:, :, oldest:], ring_BKWC[:, :, :oldest], new_BKTC), dim=2)

    def _write(self, start: int, k_BKTC: Tensor, v_BKTC: Tensor) -> None:
        assert self.buffers is not None
        T = k_BKTC.shape[2]
        n = min(T, self.window)
        slot = (start + T - n) % self.window
        until_end = min(n, self.window - slot)
        for ring, new in zip(self.buffers, (k_BKTC, v_BKTC)):
            ring[:, :, slot : slot + until_end] = new[:, :, T - n : T - n + until_end]
            if until_end < n:
                ring[:, :, : n - until_end] = new[:, :, T - n + until_end :]
