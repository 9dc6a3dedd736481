"""Which source each position of a mixture draws from: segments of positions, and blocks in which weights are exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

BLOCK = 2**16
"""Positions over which weights are exact: a weight is rounded to 1 / 65,536, an error below 0.0016 %."""


@dataclass(frozen=True)
class Stage:
    """From `position` on, `weights` by source name replace those before; sources left out are not read."""

    position: int
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Segment:
    """Positions from `start` on that have the same weights.

    base_S: samples drawn of each source before. source_L, rank_L: for each place in a block its source, and how many of
    that source come earlier in the block. counts_S: samples of each source in a block.
    """

    start: int
    base_S: np.ndarray
    source_L: np.ndarray
    rank_L: np.ndarray
    counts_S: np.ndarray

    def before(self, position: int) -> np.ndarray:
        """Samples drawn of each source before a position of this segment, int64 [S]."""
        blocks, rest = divmod(position - self.start, BLOCK)
        within_S = np.bincount(self.source_L[:rest], minlength=len(self.base_S))
        return self.base_S + blocks * self.counts_S + within_S


def quantise(shares_S: np.ndarray) -> np.ndarray:
    """Samples of each source in a block, int64, at least 1 where the share is not 0; by largest remainder."""
    ideal_S = shares_S * BLOCK
    counts_S = np.maximum(np.floor(ideal_S), shares_S > 0).astype(np.int64)
    missing = BLOCK - int(counts_S.sum())
    if missing < 0:  # so many sources got their 1
        counts_S[counts_S.argmax()] += missing
    else:
        counts_S[np.argsort(counts_S - ideal_S, kind="stable")[:missing]] += 1
    return counts_S


def interleave(counts_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Source of each place of a block, and how many of that source come before it; int64 [L].

    The r-th sample of a source is due at (r + 1/2) / count of the block: any prefix then has each source's share to
    within 1/2 + S/2 times the share, and in practice one sample.
    """
    source = np.repeat(np.arange(len(counts_S)), counts_S)
    rank = np.concatenate([np.arange(n) for n in counts_S])
    due = np.argsort((rank + 0.5) / counts_S[source], kind="stable")
    return source[due], rank[due]
