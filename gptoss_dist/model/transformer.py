"""The GPT-OSS transformer, to be read from top to bottom; `parallel/parallelize.py` applies parallelism from outside.

A batch of token ids is embedded, passes the blocks, and is normalised; the head gives logits, or together with labels
the sums that a loss is made of. `attention.py` and `moe.py` hold the two halves of a block.

The module tree and the parameter layouts are those of `transformers.GptOssForCausalLM`, so that a state dict is a
Hugging Face one.

Shapes: B batch, T tokens, D hidden_size, V vocab_size, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from gptoss_dist.model.attention import Attention, LayerCache, SequencePart
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.generate import generate
from gptoss_dist.model.kv_cache import KVCache
from gptoss_dist.model.linear import Linear
from gptoss_dist.model.losses import balance_loss, z_loss
from gptoss_dist.model.moe import MoE, RouterStats
from gptoss_dist.model.rope import RotaryTables
from gptoss_dist.ops.attention.documents import Documents, locate_documents
from gptoss_dist.ops.cross_entropy import linear_cross_entropy, linear_token_losses
from gptoss_dist.ops.rms_norm import rms_norm

IGNORE_INDEX = -100
"""Label of a token that carries no loss (the convention of torch and transformers)."""


class LossSums(NamedTuple):
    """Result of a forward pass with labels: sums that add up over micro-batches and ranks."""

    token_loss: Tensor
    """Sum of the token losses in nats, float32."""
    stats: RouterStats
    """Router sums with a leading layer dimension: counts [L, E], probability [L, E], z [L], entropy [L]."""


class TokenScores(NamedTuple):
    """Result of a forward pass that scores each label by itself."""

    loss_BT: Tensor
    """Loss in nats, float32; 0 where there is no label."""
    is_greedy_BT: Tensor
    """Whether the label is the likeliest token, bool."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight in float32 (arXiv:1910.07467); as in GPT-OSS, only the product with the weight is rounded."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normalised tokens, [B, T, D] in x's dtype."""
        return rms_norm(x_BTD, self.weight, self.eps)


class Block(nn.Module):
    """Pre-norm attention and mixture of experts, each with a residual connection."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        documents: Documents | None = None,
        cache: LayerCache | None = None,
        part: SequencePart | None = None,
        statistics: bool = True,
    ) -> tuple[Tensor, RouterStats | None]:
        """Return tokens for the next block, [B, T, D], and the router's sums if asked (`statistics`).

        The other arguments are those of `Attention.forward`.
        """
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotary, documents, cache, part)
        y_BTD, stats = self.mlp(self.post_attention_layernorm(x_BTD), statistics)
        return x_BTD + y_BTD, stats


class Decoder(nn.Module):
    """Token embedding, blocks and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layer_types = config.attention_types
        self.rotary_tables = RotaryTables(config)

    def forward(
        self,
        input_ids_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        cache: KVCache | None = None,
        part: SequencePart | None = None,
        statistics: bool = True,
    ) -> tuple[Tensor, RouterStats | None]:
        """Return final hidden states [B, T, D], and router sums with a leading layer dimension if asked for them.

        What all layers need to know of positions and documents is computed here, once, and handed down.
        """
        x_BTD = self.embed_tokens(input_ids_BT)
        caches: Sequence[LayerCache | None] = [None] * len(self.layers)
        position_T = (
            torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device) if part is None else part.position_T
        )
        if cache is not None:
            if document_ids_BT is not None:
                raise ValueError("document_ids_BT cannot be given with a cache; give each row one document")
            position_T, caches = cache.advance(input_ids_BT)
        rotary = self.rotary_tables(position_T, x_BTD.dtype)
        documents = locate_documents(document_ids_BT) if document_ids_BT is not None else None
        layer_stats = []
        for layer, layer_type, layer_cache in zip(self.layers, self.layer_types, caches):
            x_BTD, stats = layer(x_BTD, rotary[layer_type], documents, layer_cache, part, statistics)
            layer_stats.append(stats)
        stats = RouterStats(*(torch.stack(column) for column in zip(*layer_stats))) if statistics else None
        return self.norm(x_BTD), stats


class GptOss(nn.Module):
    """A GPT-OSS language model with its head.

    Its weights hold anything at first: call `gptoss_dist.model.init.initialize(model, seed)` or load a state dict.
    Build a large model on the meta device.
    """

    fixed_shapes = False
    """What the caches that come here are to be made with; see `model.generate.LanguageModel`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    @property
    def blocks(self) -> list[Block]:
        """The blocks in order, with their type, which a `ModuleList` does not know."""
        return cast(list[Block], list(self.model.layers))

    def tie(self) -> None:
        """Share the embedding with the head if the config says so. `to_empty` undoes that: call this again then."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids_BT: Tensor,
        labels_BT: Tensor | None = None,
        *,
        document_ids_BT: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        per_token: bool = False,
        part: SequencePart | None = None,
    ) -> Tensor | LossSums | TokenScores:
        """Return logits, or with labels the sums that a loss is made of, without ever holding all logits at once.

        Args:
            input_ids_BT: Token ids [B, T], int64.
            labels_BT: The token to predict *at* each position (already shifted), [B, T] int64; -100 carries no loss.
            document_ids_BT: Integers [B, T], non-decreasing along T; attention stays within equal ids.
            cache: Keys and values of earlier tokens; it is extended in place.
            last_only: Return the logits of the last position only.
            per_token: Return the loss of each label instead of their sum, without a gradient.
            part: Which part of longer sequences the ids are, if others compute the rest; it knows of documents itself.

        Returns:
            Logits [B, T or 1, V] in the compute dtype, or with labels `LossSums`, or `TokenScores`.
        """
        statistics = labels_BT is not None and not per_token
        x_BTD, stats = self.model(input_ids_BT, document_ids_BT, cache, part, statistics)
        if labels_BT is None:
            return self.lm_head(x_BTD[:, -1:] if last_only else x_BTD)
        if per_token:
            scores = linear_token_losses(
                x_BTD.flatten(0, 1), self.lm_head.weight, labels_BT.flatten(), ignore_index=IGNORE_INDEX
            )
            return TokenScores(*(column.view(labels_BT.shape) for column in scores))
        loss = linear_cross_entropy(
            x_BTD.flatten(0, 1), self.lm_head.weight, labels_BT.flatten(), ignore_index=IGNORE_INDEX
        )
        return LossSums(loss, stats)

    def loss(self, input_ids_BT: Tensor, labels_BT: Tensor, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean token loss in nats, and the auxiliary terms {"aux": balance loss, "z": router z-loss}.

        The auxiliary terms have no coefficient, and the token loss does not contain them. Arguments as in `forward`.
        """
        sums = self(input_ids_BT, labels_BT, **kwargs)
        tokens, valid = input_ids_BT.numel(), (labels_BT != IGNORE_INDEX).sum()
        auxiliary = {
            "aux": balance_loss(sums.stats, sums.stats.counts_E, tokens, self.config.num_experts_per_tok),
            "z": z_loss(sums.stats, tokens),
        }
        return sums.token_loss / valid, auxiliary

    def generate(self, input_ids_BT: Tensor, **kwargs) -> Tensor:
        """Continue token ids [B, T]; arguments and result are those of `gptoss_dist.model.generate.generate`."""
        return generate(self, input_ids_BT, **kwargs)
