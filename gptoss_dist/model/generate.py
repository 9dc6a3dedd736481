"""Text generation: the prompt in chunks, then one token at a time.

`generate` continues token ids, also with a model that several ranks share; `gptoss_dist.inference.generation` knows
prompts of different lengths, stops and seeds.

Shapes: B batch, T tokens, V vocab_size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.kv_cache import KVCache
from gptoss_dist.model.sampling import Sampling
from gptoss_dist.ops.sampling import sample

log = logging.getLogger(__name__)

PREFILL_CHUNK = 4096
"""Tokens of a prompt that pass the model at once, over all rows."""


class LanguageModel(Protocol):
    """The part of a model that `generate` needs; `GptOss` has it, plain or sharded, and so may others."""

    @property
    def config(self) -> ModelConfig:
        """The model's architecture."""

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""

    @property
    def fixed_shapes(self) -> bool:
        """Whether its caches are to be made with `fixed_shapes`."""

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
    min_p: float = 0.0,
    eos_id: int | None = None,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue each sequence of a batch of equally long prompts.

    Args:
        model: A model, which may be sharded: then all ranks call this alike, with equal generators, `eos_id` None.
        input_ids_BT: Prompts, [B, T >= 1] int64, on the model's device.
        max_new_tokens: How many tokens to add at most.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Sample from the k most likely tokens only; 0 switches it off.
        top_p: Sample from the smallest set of tokens with this much probability (nucleus, arXiv:1904.09751).
        min_p: Sample from tokens with at least this share of the likeliest one's probability (arXiv:2407.01082).
        eos_id: A sequence that produced this token is continued with it; generation ends when all have.
        vocab_size: Ids from here on are never produced (rows of the head that pad the tokenizer's vocabulary).
        generator: The source of randomness, on the CPU.
        on_token: Called with each new column of ids [B].

    Returns:
        Prompts and continuations, [B, T + new] int64.

    Raises:
        ValueError: The prompt is empty, a setting is out of range, or logits are nan.
    """
    T = input_ids_BT.shape[1]
    _check_sizes(T, max_new_tokens, model.config.max_position_embeddings)
    Sampling(temperature, top_k, top_p, min_p)  # refuses what makes no sense
    masked_ids = _ids_from(vocab_size, model).to(input_ids_BT.device)
    was_training = model.training
    model.eval()
    try:
        cache, columns = cache_for(model, T + max_new_tokens), list(input_ids_BT.split(1, dim=1))
        done_B = torch.zeros_like(input_ids_BT[:, 0], dtype=torch.bool)
        logits_BV = prefill(model, input_ids_BT, cache)
        for remaining in reversed(range(max_new_tokens)):
            next_B = sample(mask_ids(logits_BV, masked_ids), temperature, top_k, top_p, generator, min_p=min_p)
            check_choice(next_B)
            if eos_id is not None:
                next_B = torch.where(done_B, eos_id, next_B)
                done_B |= next_B == eos_id
            if on_token is not None:
                on_token(next_B)
            columns.append(next_B[:, None])
            if remaining == 0 or (eos_id is not None and bool(done_B.all())):
                break
            logits_BV = model(next_B[:, None], cache=cache, last_only=True)[:, -1]
    finally:
        model.train(was_training)
    return torch.cat(columns, dim=1)


def _check_sizes(prompt: int, max_new_tokens: int, longest: int) -> None:
    if prompt == 0:
        raise ValueError("the prompt has no token; give at least one (for example the end-of-text token)")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 0 or more")
    warn_of_length(prompt, max_new_tokens, longest)


def _ids_from(first: int | None, model: LanguageModel) -> Tensor:
    """Return the ids of a model from `first` on, [n] int64; None is no first one."""
    known = model.config.vocab_size
    return torch.arange(known if first is None else min(first, known), known)


def cache_for(model: LanguageModel, capacity: int, padding: Sequence[int] | None = None) -> KVCache:
    """Return an empty cache, of fixed shapes if the model wants them.

    Args:
        model: The model.
        capacity: For how many columns there is to be room.
        padding: That of `KVCache`.
    """
    if model.fixed_shapes:
        return KVCache(model.config, capacity=fixed_room(capacity), padding=padding, fixed_shapes=True)
    return KVCache(model.config, capacity=capacity, padding=padding)


def fixed_room(capacity: int) -> int:
    """Return the room of a cache of fixed shapes: what was compiled for one text serves others of about its length."""
    return -(-capacity // 256) * 256


def prefill(model: LanguageModel, input_ids_BT: Tensor, cache: KVCache, chunk: int = PREFILL_CHUNK) -> Tensor:
    """Put prompts into a cache, and return the logits behind the last token of each, [B, V].

    Args:
        model: The model.
        input_ids_BT: Prompts, which end together if they differ in length (see `KVCache`).
        cache: An empty cache, which is filled.
        chunk: How many tokens, of all rows together, pass the model at once; a row's at least.
    """
    for part_BT in input_ids_BT.split(columns_of_chunk(chunk, input_ids_BT.shape[0]), dim=1):
        logits_B1V = model(part_BT, cache=cache, last_only=True)
    return logits_B1V[:, -1]


def columns_of_chunk(chunk: int, rows: int) -> int:
    """Return how many columns of a batch pass the model at once."""
    return max(chunk // rows, 1)


def mask_ids(logits_BV: Tensor, masked_ids: Tensor) -> Tensor:
    """Return logits in float32, -inf for ids that are never to be chosen; float32 logits are changed in place.

    Args:
        logits_BV: Logits.
        masked_ids: The ids, [n] int64 on the device of the logits.
    """
    return logits_BV.float().index_fill_(1, masked_ids, -torch.inf)


def check_choice(next_B: Tensor) -> None:
    """Refuse the -1 that `sample` returns for logits that are nan; the host waits for the device.

    Raises:
        ValueError: There is one.
    """
    if bool((next_B < 0).any()):
        raise ValueError("the model's logits are nan: its weights are broken, or its training has diverged")


def warn_of_length(prompt: int, new: int, longest: int) -> None:
    """Warn of text beyond the positions that the model was made for."""
    if prompt + new > longest:
        log.warning(
            "a prompt of %d tokens and up to %d new ones are more than the %d positions that the model was made for "
            "(max_position_embeddings); do not rely on the text beyond",
            *(prompt, new, longest),
        )
