"""Completions of many prompts at once: prompts of any lengths, several samples of each, a seed for each sample.

Prompts pass the model once, in chunks, together. Then all samples grow by one token at a time; when half of them are
finished, the others go on without them.

Shapes: B samples in a batch, T tokens, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from data_pipeline import Tokenizer
from gptoss_dist.inference.compiled import Compile, decoder_for
from gptoss_dist.inference.stops import GrowingText
from gptoss_dist.model.generate import (
    PREFILL_CHUNK,
    LanguageModel,
    cache_for,
    columns_of_chunk,
    mask_ids,
    prefill,
    warn_of_length,
)
from gptoss_dist.model.kv_cache import KVCache
from gptoss_dist.model.sampling import PLAIN, Sampling
from gptoss_dist.model.transformer import GptOss
from gptoss_dist.ops.sampling import penalize_repetition, sample

_BROKEN = 2**31
"""What a rank says in place of its number of unfinished samples if it cannot go on."""


@dataclass(frozen=True)
class Completion:
    """One sample."""

    ids: list[int]
    """Without the prompt, and without what ended it: no stop id, and no token that is only part of a stop text."""
    logprobs: list[float] | None
    """Of each id, the logarithm of its probability under the model itself, as in its perplexity: before temperature,
    penalty and top-k, and among all ids of the model, those that are never produced too."""
    finish: Literal["stop", "length"]
    """Whether a stop id or text ended it, or `max_new_tokens`."""
    text: str | None = None
    """What `ids` mean, up to a stop text, if there was a tokenizer."""


@torch.no_grad()
def complete(
    model: GptOss,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling = PLAIN,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    stop_texts: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    n: int = 1,
    seeds: Sequence[int] | None = None,
    logprobs: bool = False,
    vocab_size: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    on_text: Callable[[int, str], None] | None = None,
    largest: Callable[[int], int] | None = None,
    compile: Compile = "auto",
    earlier_steps: int = 0,
) -> list[list[Completion]]:
    """Return n completions of each prompt, all made in one batch.

    A sample depends on its prompt and its seed, and on its neighbours only by how products of other sizes are rounded.

    Args:
        model: A model, which may be sharded: then all ranks call this together, with equal `max_new_tokens` and with
            `largest`. Their prompts, and the numbers of these, may differ.
        prompts: Token ids of each prompt, one at least.
        sampling: How tokens are chosen.
        max_new_tokens: How many tokens to add at most.
        stop_ids: Each of them ends a sample.
        stop_texts: Each of them ends a sample, wherever tokens begin and end; they need a tokenizer.
        tokenizer: What the ids mean. Completions then have texts, and no id without a token.
        n: Samples of each prompt, which passes the model once.
        seeds: One of each sample, those of the first prompt first. By default torch's global generator draws them.
        logprobs: Whether to return log-probabilities.
        vocab_size: Ids from here on are never produced.
        prefill_chunk: How many tokens, of all prompts together, pass the model at once.
        on_text: Called with the number of a sample and the next piece of its text, as it is written.
        largest: Returns the largest of the ranks' numbers, at every rank.
        compile: Whether to compile the decoding step; `auto` does where it pays (`compiled.py`).
        earlier_steps: Tokens that earlier texts of as many samples and about the same length took, for `auto`.

    Raises:
        ValueError: A prompt is empty or has unknown ids, a setting is out of range or impossible, or logits are nan.
    """
    _check(model, prompts, n, seeds, max_new_tokens, prefill_chunk)
    stops = _encoded(stop_texts, tokenizer, on_text)
    seeds = torch.randint(2**62, (len(prompts) * n,)).tolist() if seeds is None else seeds
    texts = [GrowingText(tokenizer, stops) if tokenizer else None for _ in seeds]
    samples = [_Sample(i, frozenset(stop_ids), texts[i], seed, on_text) for i, seed in enumerate(seeds)]
    used = (prompts, n) if samples else ([[0]], 1)
    columns, steps = max(map(len, used[0])) + max_new_tokens, earlier_steps + max_new_tokens
    decoder = decoder_for(model, compile, steps=steps, columns=columns, is_shared=largest is not None)
    if samples or largest is not None:
        with _in_evaluation_mode(model):
            batch = _Batch(decoder, *used, samples, columns, prefill_chunk, largest, model.lm_head.weight.device)
            batch.complete(sampling, _masked_ids(model, vocab_size, tokenizer), max_new_tokens, logprobs)
    done = [one.completion(logprobs) for one in samples]
    return [done[start : start + n] for start in range(0, len(done), n)]


@contextmanager
def _in_evaluation_mode(model: GptOss) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check(
    model: GptOss,
    prompts: Sequence[Sequence[int]],
    n: int,
    seeds: Sequence[int] | None,
    max_new_tokens: int,
    prefill_chunk: int,
) -> None:
    """Refuse what makes no sense, and warn of what may not.

    Raises:
        ValueError: See `complete`.
    """
    for name, value in (("n", n), ("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
    for number, ids in enumerate(prompts):
        if len(ids) == 0:
            raise ValueError(f"prompt {number} has no token; give at least one (for example the end-of-text token)")
        if min(ids) < 0 or max(ids) >= model.config.vocab_size:
            raise ValueError(
                f"prompt {number} has ids from {min(ids)} to {max(ids)}, and the model's vocab_size is "
                f"{model.config.vocab_size}; use the tokenizer that it was trained with"
            )
    if seeds is not None and len(seeds) != len(prompts) * n:
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts with n={n}; give one of each sample")
    warn_of_length(max(map(len, prompts), default=1), max_new_tokens, model.config.max_position_embeddings)


def _masked_ids(model: GptOss, vocab_size: int | None, tokenizer: Tokenizer | None) -> torch.Tensor:
    """Return the ids of a model that are never produced, [n] int64 on its device.

    Args:
        model: The model.
        vocab_size: That of `complete`, as `tokenizer`.
    """
    is_masked_V = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    if vocab_size is not None:
        is_masked_V[vocab_size:] = True
    if tokenizer is not None:
        is_masked_V[torch.from_numpy(tokenizer.ids_without_token(len(is_masked_V)))] = True
    return is_masked_V.nonzero()[:, 0].to(model.lm_head.weight.device)


def _encoded(stop_texts: Sequence[str], tokenizer: Tokenizer | None, on_text: Callable | None) -> list[bytes]:
    """Return the bytes of the stop texts.

    Raises:
        ValueError: One is empty, or there is no tokenizer, which texts need.
    """
    if "" in stop_texts or (tokenizer is None and (stop_texts or on_text is not None)):
        raise ValueError(f"stop_texts={list(stop_texts)} must not be empty; they, and on_text, need a tokenizer")
    return [text.encode() for text in stop_texts]


class _Sample:
    """One sample while it grows."""

    def __init__(
        self,
        number: int,
        stop_ids: frozenset[int],
        text: GrowingText | None,
        seed: int,
        on_text: Callable[[int, str], None] | None,
    ) -> None:
        self.number, self.stop_ids, self.text, self.on_text = number, stop_ids, text, on_text
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.stopped = False
        self.generator = torch.Generator().manual_seed(seed)

    def take(self, token: int, logprob: float) -> None:
        """Go on with this token, or stop."""
        if token in self.stop_ids:
            self.stopped = True
        else:
            self.ids.append(token)
            self.logprobs.append(logprob)
            self.stopped = self.text is not None and self.text.add(token)
        if self.text is not None and self.on_text is not None:
            self._show(final=self.stopped)

    def _show(self, final: bool) -> None:
        assert self.text is not None and self.on_text is not None
        if piece := self.text.news(final=final):
            self.on_text(self.number, piece)

    def completion(self, logprobs: bool) -> Completion:
        """Return the result, when there is nothing to come."""
        kept = len(self.ids)
        if self.text is not None:
            kept = self.text.tokens
            if self.on_text is not None and not self.stopped:
                self._show(final=True)
        return Completion(
            self.ids[:kept],
            self.logprobs[:kept] if logprobs else None,
            "stop" if self.stopped else "length",
            None if self.text is None else str(self.text),
        )


class _Batch:
    """Samples that grow together, with their cache. Those that are finished stay until half of them are."""

    def __init__(
        self,
        decoder: LanguageModel,
        prompts: Sequence[Sequence[int]],
        n: int,
        samples: list[_Sample],
        columns: int,
        prefill_chunk: int,
        largest: Callable[[int], int] | None,
        device: torch.device,
    ) -> None:
        self.decoder, self.samples, self.largest = decoder, list(samples), largest or int
        longest = max(map(len, prompts))
        padding = [longest - len(ids) for ids in prompts]
        ids_BT = torch.tensor([[0] * pad + list(ids) for pad, ids in zip(padding, prompts)], device=device)
        self.cache = cache_for(decoder, columns, padding)
        passes = -(-longest // columns_of_chunk(prefill_chunk, len(prompts)))
        behind = self.largest(passes) - passes
        self.logits_BV = prefill(decoder, ids_BT, self.cache, prefill_chunk)
        for _ in range(behind):  # passes that the rank with the longest prompts still makes
            decoder(ids_BT[:1, :1], cache=KVCache(decoder.config), last_only=True)
        rows = [row for row in range(len(prompts)) for _ in range(n)]
        if n > 1:
            self.cache.select(rows)
            self.logits_BV = self.logits_BV[rows]
        self.seen_BV = torch.zeros(self.logits_BV.shape, dtype=torch.bool, device=device)
        for row, prompt in enumerate(rows):
            self.seen_BV[row, ids_BT[prompt, padding[prompt] :]] = True

    def complete(self, sampling: Sampling, masked_ids: torch.Tensor, max_new_tokens: int, logprobs: bool) -> None:
        """Let the samples grow until all are finished, on all ranks.

        Raises:
            ValueError: Logits are nan, on this rank or another one.
        """
        for new in range(1, max_new_tokens + 1):
            is_sound = self.grow(sampling, masked_ids, logprobs)
            going = self.largest(len(self.unfinished()) if is_sound else _BROKEN)
            if going == _BROKEN:  # on all ranks: none waits for another one
                raise ValueError("the model's logits are nan: its weights are broken, or its training has diverged")
            if not going or new == max_new_tokens:
                return
            self.step()

    def unfinished(self) -> list[int]:
        """Return which rows go on."""
        return [row for row, one in enumerate(self.samples) if not one.stopped]

    def grow(self, sampling: Sampling, masked_ids: torch.Tensor, logprobs: bool) -> bool:
        """Choose a token for each sample, and return whether that could be done: not where logits are nan.

        Without `logprobs` samples get logits for these.
        """
        # The probabilities are those of all ids, as in training, before some of them are masked in place.
        normalizer_B = self.logits_BV.float().logsumexp(-1) if logprobs else 0.0
        logits_BV = mask_ids(self.logits_BV, masked_ids)
        scores_BV, uniform_B = logits_BV, None
        if sampling.repetition_penalty != 1:
            scores_BV = penalize_repetition(logits_BV, self.seen_BV, sampling.repetition_penalty)
        if sampling.temperature > 0:
            uniform_B = torch.zeros(len(logits_BV), dtype=torch.float64)
            for row, one in enumerate(self.samples):
                uniform_B[row] = torch.rand((), dtype=torch.float64, generator=one.generator)
        self.next_B = sample(
            scores_BV, sampling.temperature, sampling.top_k, sampling.top_p, min_p=sampling.min_p, uniform_B=uniform_B
        )
        next_B1 = self.next_B.clamp(min=0)[:, None]
        if sampling.repetition_penalty != 1:
            self.seen_BV.scatter_(1, next_B1, True)
        logprob_B = logits_BV.gather(1, next_B1)[:, 0] - normalizer_B
        for one, token, logprob in zip(self.samples, self.next_B.tolist(), logprob_B.tolist()):
            if token < 0 or not math.isfinite(logprob):
                return False
            if not one.stopped:
                one.take(token, logprob)
        return True

    def step(self) -> None:
        """Put the chosen tokens through the model, without samples that are finished if these are half of all.

        For a compiled step the batch stays as large as it is: another size would be compiled anew.
        """
        rows = self.unfinished()
        if 0 < len(rows) <= len(self.samples) // 2 and not self.cache.fixed_shapes:
            self.cache.select(rows)
            self.samples = [self.samples[row] for row in rows]
            self.next_B, self.seen_BV = self.next_B[rows], self.seen_BV[rows]
        self.logits_BV = self.decoder(self.next_B[:, None], cache=self.cache, last_only=True)[:, -1]
