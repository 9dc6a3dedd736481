"""What the losses of tokens add up to: loss, perplexity, bits per byte, and the loss by the length of the context.

A special token, such as the one that ends a document, has a loss like others and stands for no text. It counts in loss
and perplexity, and neither its loss nor a byte of it in bits per byte.

    context  1 to 63 | 64 to 127 | 128 to 255 | ...      tokens that the model saw when it predicted the next one

Shapes: B rows, T tokens, V ids of the tokenizer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipeline import Tokenizer
from data_pipeline.batches.reading import IGNORED_LABEL

FIRST_BUCKET = 6
"""Contexts of less than 2**7 tokens are told apart at 2**6 only."""
BUCKETS = 40


def bytes_of_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Return how many bytes of text each id stands for, int64 [V]; 0 for special tokens and for ids without one."""
    bytes_V = np.zeros(tokenizer.n_vocab, np.int64)
    for token, id_ in tokenizer.ranks.items():
        bytes_V[id_] = len(token)
    return bytes_V


def mean_by_weight(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the mean of what was measured on several sources of a mixture.

    Args:
        values: The values by the source's name.
        weights: Weights of these sources and perhaps of others. Where all of these are 0, as when a curriculum begins
            with others, each source counts as much as another.
    """
    chosen = {name: weights[name] for name in values}
    if not sum(chosen.values()):
        chosen = dict.fromkeys(values, 1.0)
    return sum(chosen[name] * values[name] for name in values) / sum(chosen.values())


@dataclass
class Tally:
    """Sums over scored tokens, which add up over batches and ranks."""

    tokens: int = 0
    loss: float = 0.0
    """Of all tokens, in nats."""
    text_loss: float = 0.0
    """Of those that stand for text."""
    bytes: int = 0
    bucket_tokens: np.ndarray = field(default_factory=lambda: np.zeros(BUCKETS, np.int64))
    bucket_loss: np.ndarray = field(default_factory=lambda: np.zeros(BUCKETS))

    def add(self, labels_BT: np.ndarray, loss_BT: np.ndarray, context_BT: np.ndarray, bytes_V: np.ndarray) -> None:
        """Count the tokens of a batch.

        Args:
            labels_BT: The tokens that were predicted, int64; -100 where none was.
            loss_BT: Their losses in nats.
            context_BT: How many tokens the model saw of the same text, 1 or more.
            bytes_V: From `bytes_of_ids`.
        """
        counted = labels_BT != IGNORED_LABEL
        labels_N, loss_N = labels_BT[counted], loss_BT[counted].astype(np.float64)
        bytes_N = bytes_V[labels_N]
        bucket_N = np.maximum(np.log2(context_BT[counted]).astype(np.int64), FIRST_BUCKET - 1)
        self.tokens += len(labels_N)
        self.loss += float(loss_N.sum())
        self.text_loss += float(loss_N[bytes_N > 0].sum())
        self.bytes += int(bytes_N.sum())
        self.bucket_tokens += np.bincount(bucket_N, minlength=BUCKETS)
        self.bucket_loss += np.bincount(bucket_N, weights=loss_N, minlength=BUCKETS)

    def __add__(self, other: Tally) -> Tally:
        names = [f.name for f in dataclasses.fields(self)]
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def mean(self) -> float:
        """Loss per token in nats."""
        return self.loss / max(self.tokens, 1)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text."""
        return self.text_loss / math.log(2) / self.bytes if self.bytes else math.nan

    def row(self, name: str) -> dict[str, Any]:
        """Return a line of the table."""
        return {
            "data": name,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "loss": self.mean,
            "perplexity": math.exp(min(self.mean, 700.0)),
            "bits_per_byte": self.bits_per_byte,
        }

    def by_context(self, longest: int) -> list[dict[str, Any]]:
        """Return a line for each range of context lengths that tokens had; none is more than `longest`."""
        lines = []
        for bucket in np.flatnonzero(self.bucket_tokens):
            tokens, loss = int(self.bucket_tokens[bucket]), float(self.bucket_loss[bucket])
            first = 1 if bucket < FIRST_BUCKET else 2 ** int(bucket)
            last = min(2 ** (int(bucket) + 1) - 1, longest)
            lines.append({"context": first, "to": last, "tokens": tokens, "loss": loss / tokens})
        return lines
