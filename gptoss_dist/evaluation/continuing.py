"""Texts that a model writes for an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_pipeline import Tokenizer
from gptoss_dist.model.generate import generate


@dataclass(frozen=True)
class ContinuationSettings:
    """How a prompt is continued."""

    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text; they are part of the result."""
    stop_texts: tuple[str, ...] = ()
    """Texts that end it; the result may hold one, and what follows it in its last token."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def key(self) -> tuple:
        """What puts like settings next to each other in an order."""
        return (
            *(self.max_new_tokens, self.temperature, self.top_k, self.top_p),
            *(self.stop_ids, self.stop_texts),
        )


@dataclass(frozen=True)
class Continuation:
    """A prompt, and how it is to be continued."""

    ids: Sequence[int]
    settings: ContinuationSettings
    seed: int = 0


def continue_prompts(
    model: Any, tokenizer: Tokenizer, continuations: Sequence[Continuation], *, in_step: bool
) -> list[list[int]]:
    """Return the new tokens of each prompt.

    Args:
        model: A `GptOss` in evaluation mode, which may be sharded.
        tokenizer: What made the prompts.
        continuations: The prompts.
        in_step: Write all tokens that may be written, whatever they are: other ranks, which hold parts of the model,
            write other texts meanwhile.
    """
    return [_continue(model, tokenizer, continuation, in_step) for continuation in continuations]


class _Stop(Exception):
    """A text has come to its end."""


def _continue(model: Any, tokenizer: Tokenizer, continuation: Continuation, in_step: bool) -> list[int]:
    settings, written = continuation.settings, list[int]()
    tail = 4 * max(map(len, settings.stop_texts), default=0) + 1  # no token is less than a byte

    def look(next_B: Tensor) -> None:
        written.append(int(next_B[0]))
        if in_step:
            return
        text = tokenizer.decode(written[-tail:]) if settings.stop_texts else ""
        if written[-1] in settings.stop_ids or any(stop in text for stop in settings.stop_texts):
            raise _Stop

    with suppress(_Stop):
        generate(
            model,
            torch.tensor([list(continuation.ids)], device=next(model.parameters()).device),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            vocab_size=tokenizer.n_vocab,
            generator=torch.Generator().manual_seed(continuation.seed),
            on_token=look,
        )
    return written
