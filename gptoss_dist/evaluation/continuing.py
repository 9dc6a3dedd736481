"""Texts that a model writes for an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline import Tokenizer
from gptoss_dist.inference import GREEDY, Sampling, complete
from gptoss_dist.model.generate import PREFILL_CHUNK


@dataclass(frozen=True)
class ContinuationSettings:
    """How a prompt is continued."""

    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text."""
    stop_texts: tuple[str, ...] = ()
    """Texts that end it, wherever tokens begin and end."""
    sampling: Sampling = GREEDY

    def __post_init__(self) -> None:
        """Refuse what no text can be written with.

        Raises:
            ValueError: A setting is out of range.
        """
        if self.max_new_tokens < 1:
            raise ValueError(f"max_gen_toks={self.max_new_tokens} must be 1 or more")

    @property
    def key(self) -> tuple:
        """What puts like settings next to each other in an order."""
        return (self.max_new_tokens, *dataclasses.astuple(self.sampling), self.stop_ids, self.stop_texts)


@dataclass(frozen=True)
class Continuation:
    """A prompt, and how it is to be continued."""

    ids: Sequence[int]
    settings: ContinuationSettings
    seed: int = 0


def continue_prompts(
    model: Any,
    tokenizer: Tokenizer,
    continuations: Sequence[Continuation],
    *,
    batch_tokens: int,
    largest: Callable[[int], int] | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, without those behind its end; the last one may hold a part of a stop text.

    Args:
        model: A `GptOss` in evaluation mode, which may be sharded.
        tokenizer: What made the prompts.
        continuations: The prompts, one at least; all have the same settings.
        batch_tokens: The most tokens that pass the model at once.
        largest: As that of `complete`, where other ranks hold parts of the model.
    """
    settings = continuations[0].settings
    found = complete(
        model,
        [continuation.ids for continuation in continuations],
        settings.sampling,
        max_new_tokens=settings.max_new_tokens,
        stop_ids=settings.stop_ids,
        stop_texts=settings.stop_texts,
        tokenizer=tokenizer,
        prefill_chunk=min(PREFILL_CHUNK, batch_tokens),
        seeds=[continuation.seed for continuation in continuations],
        largest=largest,
        compile=False,  # other shapes in every round, and perhaps a model that trains
    )
    return [completion.ids for (completion,) in found]
