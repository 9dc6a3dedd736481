"""Grouped-query attention with learned sinks, sliding or full.

Shapes: B batch, T query tokens, S key tokens, D hidden_size, H query heads, K key/value heads, C head_dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from gptoss_dist.model.config import SLIDING, ModelConfig
from gptoss_dist.model.linear import Linear
from gptoss_dist.model.rope import apply_rotary
from gptoss_dist.ops.attention.documents import Documents
from gptoss_dist.ops.attention.sink_attention import sink_attention


class LayerCache(Protocol):
    """The part of a layer's key/value cache that attention needs; `model/kv_cache.py` has it."""

    def attend(
        self, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, sinks_H: Tensor, *, scale: float, backend: str
    ) -> Tensor:
        """Store new keys and values, and return what the new tokens gather from all that they see, [B, H, T, C].

        Args:
            q_BHTC: Queries of the new tokens.
            k_BKTC: Keys of the new tokens.
            v_BKTC: Values of the new tokens.
            sinks_H: One logit per query head.
            scale: Factor on q . k.
            backend: The back end where many tokens come at once, as in `sink_attention`.
        """


class SequencePart(Protocol):
    """The part of every sequence that is computed here, if the rest is elsewhere; `parallel/context.py` has it."""

    position_T: Tensor
    """Positions of its tokens in the whole sequence, int64."""

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
        """Return what `sink_attention` gives these queries of the whole sequence, [B, H, T, C].

        Args:
            q_BHTC: Queries of the part.
            k_BKTC: Keys of the part; those of the rest are where the rest is.
            v_BKTC: Values of the part.
            sinks_H: One logit per query head.
            scale: Factor on q . k.
            window: How many keys a query sees, or None for all earlier ones.
            backend: As for `sink_attention`.
        """


class Attention(nn.Module):
    """Projections, rotary embedding, sink attention, and a projection back. The scale is 1 / sqrt(head_dim)."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        D, C, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = C
        self.window = config.sliding_window if config.attention_types[layer_index] == SLIDING else None
        self.sink_clamp = config.sink_clamp
        self.backend = "auto"
        """The back end of `ops.attention.sink_attention`."""
        self.q_proj = Linear(D, config.num_attention_heads * C, bias=bias)
        self.k_proj = Linear(D, config.num_key_value_heads * C, bias=bias)
        self.v_proj = Linear(D, config.num_key_value_heads * C, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * C, D, bias=bias)
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads))

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        documents: Documents | None = None,
        cache: LayerCache | None = None,
        part: SequencePart | None = None,
    ) -> Tensor:
        """Return what each token gathered from those that it sees, [B, T, D].

        Args:
            x_BTD: Normalised tokens.
            rotary: cos and sin of the tokens' positions, [T, C / 2] or [B, T, C / 2] each (see `RotaryTables`).
            documents: Where documents lie, if attention is to stay within them; not looked at with a cache.
            cache: This layer's part of the cache, which is extended in place.
            part: Which part of the sequences these tokens are, if not all; it knows of documents itself.
        """
        B, T, _ = x_BTD.shape
        q_BHTC = apply_rotary(self.q_proj(x_BTD).view(B, T, -1, self.head_dim), *rotary).transpose(1, 2)
        k_BKTC = apply_rotary(self.k_proj(x_BTD).view(B, T, -1, self.head_dim), *rotary).transpose(1, 2)
        v_BKTC = self.v_proj(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)
        sinks_H = self.sinks if self.sink_clamp is None else self.sinks.clamp(*self.sink_clamp)
        scale = self.head_dim**-0.5
        if part is not None:
            o_BHTC = part.attend(q_BHTC, k_BKTC, v_BKTC, sinks_H, scale=scale, window=self.window, backend=self.backend)
        elif cache is not None:
            o_BHTC = cache.attend(q_BHTC, k_BKTC, v_BKTC, sinks_H, scale=scale, backend=self.backend)
        else:
            o_BHTC = sink_attention(
                q_BHTC,
                k_BKTC,
                v_BKTC,
                sinks_H,
                scale=scale,
                window=self.window,
                documents=documents,
                backend=self.backend,
            )
        return self.o_proj(o_BHTC.transpose(1, 2).reshape(B, T, -1))
