"""Text generation: one pass over the prompt, then one token at a time.

Shapes: B batch, T tokens, V vocab_size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.kv_cache import KVCache

log = logging.getLogger(__name__)


class LanguageModel(Protocol):
    """The part of a model that `generate` needs; `GptOss` has it, plain or sharded, and so may others."""

    config: ModelConfig
    training: bool

    def __call__(self, input_ids_BT: Tensor, *, cache: KVCache, last_only: bool) -> Tensor:
        """Return logits [B, T or 1, V], and extend the cache in place."""

    def eval(self) -> object:
        """Switch to evaluation mode."""

    def train(self, mode: bool) -> object:
        """Switch to training mode, or with False to evaluation mode."""


@torch.no_grad()
def generate(
    model: LanguageModel,
    input_ids_BT: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue each sequence of a batch of equally long prompts.

    Args:
        model: A model, which may be sharded: then all ranks must call this alike, with generators in the same state and
            `eos_id` None.
        input_ids_BT: Prompts, [B, T >= 1] int64, on the model's device.
        max_new_tokens: How many tokens to add at most.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Sample from the k most likely tokens only; 0 switches it off.
        top_p: Sample from the smallest set of tokens with this much probability (nucleus, arXiv:1904.09751).
        eos_id: A sequence that produced this token is continued with it; generation ends when all have.
        vocab_size: Ids from here on are never produced (rows of the head that pad the tokenizer's vocabulary).
        generator: The source of randomness, on the CPU.
        on_token: Called with each new column of ids [B].

    Returns:
        Prompts and continuations, [B, T + new] int64.

    Raises:
        ValueError: The prompt is empty, or a setting is out of range.
    """
    if input_ids_BT.shape[1] == 0:
        raise ValueError("the prompt has no token; give at least one (for example the end-of-text token)")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} and top_k={top_k} must be >= 0, top_p={top_p} in (0, 1]")
    _warn_of_length(input_ids_BT.shape[1], max_new_tokens, model.config.max_position_embeddings)
    was_training = model.training
    model.eval()
    cache, ids_BT, new_BT = KVCache(model.config), input_ids_BT, input_ids_BT
    done_B = torch.zeros(ids_BT.shape[0], dtype=torch.bool, device=ids_BT.device)
    for _ in range(max_new_tokens):
        logits_BV = model(new_BT, cache=cache, last_only=True)[:, -1].float()
        if vocab_size is not None:
            logits_BV[:, vocab_size:] = -torch.inf
        next_B = sample(logits_BV, temperature, top_k, top_p, generator)
        if eos_id is not None:
            next_B = torch.where(done_B, eos_id, next_B)
            done_B |= next_B == eos_id
        if on_token is not None:
            on_token(next_B)
        new_BT = next_B[:, None]
        ids_BT = torch.cat([ids_BT, new_BT], dim=1)
        if eos_id is not None and bool(done_B.all()):
            break
    model.train(was_training)
    return ids_BT


def _warn_of_length(prompt: int, new: int, longest: int) -> None:
    if prompt + new > longest:
        log.warning(
            "a prompt of %d tokens and up to %d new ones are more than the %d positions that the model was made for "
            "(max_position_embeddings); do not rely on the text beyond",
            *(prompt, new, longest),
        )


def sample(
    logits_BV: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one id per row, [B] int64: temperature first, then top-k, then top-p.

    Args:
        logits_BV: float32.
        temperature: See `generate`, as all others.
        top_k: How many of the likeliest tokens to draw from, or 0.
        top_p: How much probability to draw from.
        generator: The source of randomness, on the CPU.
    """
    if temperature < torch.finfo(torch.float32).tiny:  # 0 for float32
        return logits_BV.argmax(dim=-1)
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature  # however small, nothing is NaN
    if 0 < top_k < logits_BV.shape[-1]:
        smallest_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        p_BV = sorted_BV.softmax(dim=-1)
        # Drop a token if those before it already reach top_p; the first always stays.
        drop_BV = p_BV.cumsum(dim=-1) - p_BV >= top_p
        logits_BV = logits_BV.masked_fill(torch.zeros_like(drop_BV).scatter(1, order_BV, drop_BV), -torch.inf)
    p_BV = logits_BV.softmax(dim=-1).cpu()
    return torch.multinomial(p_BV, 1, generator=generator)[:, 0].to(logits_BV.device)
