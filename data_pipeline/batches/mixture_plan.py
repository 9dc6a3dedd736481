"""Which source each position of a mixture draws from: a function of the position, not a state.

Weights are quantised to a block of 65,536 positions, in which the sources are interleaved evenly, and blocks
repeat. How often a source was drawn before any position is then arithmetic, and that count is the position in the
source's own shuffled order. What changes the weights (a stage of a curriculum, a source that is used up) starts a new
segment of positions, which carries the counts on.

For example, with blocks of 5 positions instead of 65,536, and sources a and b of weights 3 and 2:

    position        0  1  2  3  4 | 5  6  7  8  9
    source          a  b  a  b  a | a  b  a  b  a
    drawn before    0  0  1  1  2 | 3  2  4  3  5

Within a block the r-th of a source's n samples is due at (r + 1/2) / n. "Drawn before" counts samples of the same
source: it is the position in that source's own order. If a stage gives all the weight to b from position 7 on, a second
segment begins there, and goes on with b's count:

    position        0  1  2  3  4 | 5  6 | 7  8  9
    source          a  b  a  b  a | a  b | b  b  b
    drawn before    0  0  1  1  2 | 3  2 | 3  4  5

Shapes: S sources, L = 65,536 positions of a block; any shape of positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 2**16
"""Positions over which weights are exact: a weight is rounded to 1 / 65,536, an error below 0.0016 %."""


@dataclass(frozen=True)
class Stage:
    """A change of the weights."""

    position: int
    """The first position that has these weights."""
    weights: Mapping[str, float]
    """Weights by source name, in any unit, in the place of those before; sources left out are not read."""


@dataclass(frozen=True)
class Segment:
    """Positions from `start` on that have the same weights."""

    start: int
    base_S: np.ndarray
    """Samples drawn of each source before `start`, int64."""
    source_L: np.ndarray
    """The source of each place in a block, int64."""
    rank_L: np.ndarray
    """How many samples of that source come earlier in the block, int64."""
    counts_S: np.ndarray
    """Samples of each source in a block, int64."""

    def before(self, position: int) -> np.ndarray:
        """Return the samples drawn of each source before a position of this segment, int64 [S]."""
        blocks, rest = divmod(position - self.start, BLOCK)
        within_S = np.bincount(self.source_L[:rest], minlength=len(self.base_S))
        return self.base_S + blocks * self.counts_S + within_S


def quantise(shares_S: np.ndarray) -> np.ndarray:
    """Return the samples of each source in a block, int64 [S], by largest remainder.

    Args:
        shares_S: Shares of samples, which sum to 1. A source whose share is not 0 gets at least one sample.
    """
    ideal_S = shares_S * BLOCK
    counts_S = np.maximum(np.floor(ideal_S), shares_S > 0).astype(np.int64)
    missing = BLOCK - int(counts_S.sum())
    if missing < 0:  # so many sources got their 1
        counts_S[counts_S.argmax()] += missing
    else:
        counts_S[np.argsort(counts_S - ideal_S, kind="stable")[:missing]] += 1
    return counts_S


def interleave(counts_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each place of a block, and how many of that source come before it, int64 [L] each.

    The r-th sample of a source is due at (r + 1/2) / count of the block. Any prefix then has each source's share to
    within 1/2 + S/2 times the share, and in practice to within one sample.

    Args:
        counts_S: Samples of each source in the block, int64.
    """
    source = np.repeat(np.arange(len(counts_S)), counts_S)
    rank = np.concatenate([np.arange(n) for n in counts_S])
    due = np.argsort((rank + 0.5) / counts_S[source], kind="stable")
    return source[due], rank[due]


@dataclass(frozen=True)
class PlannedSource:
    """What a plan needs to know of a source."""

    name: str
    content_sha256: str
    tokens_per_sample: float
    """The mean number of tokens of a sample over an epoch, without padding."""
    samples_per_epoch: int
    max_epochs: float | None
    """Passes over the source after which it is used up; None is no limit."""

    @property
    def limit(self) -> int | None:
        """The samples that may be drawn of the source in all; None is no limit."""
        return None if self.max_epochs is None else int(self.max_epochs * self.samples_per_epoch)


class MixturePlan:
    """The segments of a mixture's positions, from `start` on.

    Attributes:
        sources: The sources, in the order of S.
        start: The first position.
        weights: The share of tokens of each source that the plan begins with, by name; they sum to 1.
        segments: The segments, with growing starts.
        changes: Positions where the weights change, and what happens there in words.
        positions_total: The position where the data end if every source has a limit, else None.
    """

    def __init__(
        self,
        sources: Sequence[PlannedSource],
        weights: Mapping[str, float],
        stages: Sequence[Stage],
        *,
        start: int,
        consumed_S: np.ndarray,
    ):
        """Plan a mixture.

        Args:
            sources: The sources.
            weights: Weights of the sources by name, in any unit.
            stages: Changes of the weights, with growing positions.
            start: The first position.
            consumed_S: Samples drawn of each source before `start`, int64 [S].

        Raises:
            ValueError: The weights are impossible, or a stage does not come after the one before it.
        """
        self.sources, self.start = list(sources), start
        self.positions_total: int | None = None
        self.changes: list[tuple[int, str]] = []
        self.weights = self._shares_of_tokens(weights, "the weights of the sources")
        self.segments = self._plan(self._changes_of_weights(stages), consumed_S)
        self._starts = np.array([segment.start for segment in self.segments])

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which source a position draws from, and how many samples were drawn of it before.

        Args:
            positions: Positions, int64 of any shape.

        Returns:
            Two int64 arrays of that shape.

        Raises:
            ValueError: A position is before the start or behind the end.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < self.start:
            raise ValueError(f"position {positions.min()}: this mixture starts at {self.start}")
        if self.positions_total is not None and positions.size and positions.max() >= self.positions_total:
            raise ValueError(f"position {positions.max()}: the data end at {self.positions_total}")
        source, count = np.empty_like(positions), np.empty_like(positions)
        segments = np.searchsorted(self._starts, positions, side="right") - 1
        for i in np.unique(segments):
            segment, chosen = self.segments[i], segments == i
            blocks, place = np.divmod(positions[chosen] - segment.start, BLOCK)
            source[chosen] = s = segment.source_L[place]
            count[chosen] = segment.base_S[s] + blocks * segment.counts_S[s] + segment.rank_L[place]
        return source, count

    def counts(self, position: int) -> np.ndarray:
        """Return the samples drawn of each source before a position, int64 [S], those before the start included."""
        assert position >= self.start, (position, self.start)
        return self._segment_at(position).before(position)

    def shares(self, position: int) -> str:
        """Return the shares of tokens at a position, in words."""
        return self._describe(self._segment_at(position))

    def _segment_at(self, position: int) -> Segment:
        return self.segments[np.searchsorted(self._starts, position, side="right") - 1]

    def _shares_of_tokens(self, weights: Mapping[str, float], what: str) -> dict[str, float]:
        """Return shares of tokens by name, which sum to 1.

        Raises:
            ValueError: A weight is impossible; the message begins with `what`.
        """
        names = [source.name for source in self.sources]
        unknown = [name for name in weights if name not in names]
        if unknown:
            raise ValueError(f"{what} name {unknown[0]!r}, which is no source; there are {', '.join(names)}")
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{what}: {name}={weight} must be a finite number, 0 or more")
        total = sum(weights.values())
        if total <= 0:
            raise ValueError(f"{what} are all 0; give at least one source a weight above 0")
        return {name: weights.get(name, 0.0) / total for name in names}

    def _changes_of_weights(self, stages: Sequence[Stage]) -> list[tuple[int, str, dict[str, float]]]:
        """Return (position, why, weights) of each change that is planned, the first one at the start."""
        changes = [(self.start, "", self.weights)]
        for number, stage in enumerate(stages, 1):
            if number > 1 and stage.position <= stages[number - 2].position:
                raise ValueError(f"stage {number} starts at {stage.position}, not after the one before it")
            weights = self._shares_of_tokens(stage.weights, f"the weights of stage {number}")
            why = f"stage {number} starts"
            if stage.position <= self.start:  # over already, or in force from the start
                changes = [(self.start, why if stage.position == self.start else "", weights)]
            else:
                changes.append((stage.position, why, weights))
        return changes

    def _plan(self, changes: list[tuple[int, str, dict[str, float]]], base_S: np.ndarray) -> list[Segment]:
        """Return the segments between the planned changes and those that come when a source is used up."""
        segments: list[Segment] = []
        for number, (position, why, weights) in enumerate(changes):
            end = changes[number + 1][0] if number + 1 < len(changes) else None
            while end is None or position < end:
                shares_S = self._shares_of_samples(weights, base_S)
                if not shares_S.any():
                    self.positions_total = position
                    self.changes.append((position, "the data end: every source that has a weight is used up"))
                    return segments or [self._segment(position, self._shares_of_samples(weights, None), base_S)]
                segment = self._segment(position, shares_S, base_S)
                if segments or why:
                    self.changes.append((position, f"{why}; now {self._describe(segment)}"))
                segments.append(segment)
                used_up = self._first_used_up(segment)
                if used_up is not None and (end is None or used_up[0] < end):
                    position, source = used_up
                    why = f"{source.name} is used up after {source.max_epochs:g} epochs"
                elif end is not None:
                    position = end
                else:
                    return segments
                base_S = segment.before(position)
        return segments

    def _shares_of_samples(self, weights: Mapping[str, float], base_S: np.ndarray | None) -> np.ndarray:
        """Return the shares of samples in any unit, float64 [S]; 0 for sources that `base_S` has used up, if given."""
        shares_S = np.array([weights[source.name] / source.tokens_per_sample for source in self.sources])
        for s, source in enumerate(self.sources):
            if base_S is not None and source.limit is not None and base_S[s] >= source.limit:
                shares_S[s] = 0
        return shares_S

    def _segment(self, start: int, shares_S: np.ndarray, base_S: np.ndarray) -> Segment:
        # By content: the order in which the sources are listed decides nothing.
        order_S = np.argsort([source.content_sha256 for source in self.sources])
        counts_S = np.empty(len(order_S), np.int64)
        counts_S[order_S] = quantise(shares_S[order_S] / shares_S.sum())
        source_L, rank_L = interleave(counts_S[order_S])
        return Segment(start, base_S, order_S[source_L], rank_L, counts_S)

    def _first_used_up(self, segment: Segment) -> tuple[int, PlannedSource] | None:
        """Return where in a segment a source is first asked for more than it may give, and which source that is."""
        found = []
        for s, source in enumerate(self.sources):
            if source.limit is not None and segment.counts_S[s]:
                blocks, rank = divmod(source.limit - int(segment.base_S[s]), int(segment.counts_S[s]))
                place = int(np.flatnonzero(segment.source_L == s)[rank])
                found.append((segment.start + blocks * BLOCK + place, s))
        if not found:
            return None
        position, s = min(found)
        return position, self.sources[s]

    def _describe(self, segment: Segment) -> str:
        tokens_S = segment.counts_S * np.array([source.tokens_per_sample for source in self.sources])
        return ", ".join(f"{s.name} {n / tokens_S.sum():.2%}" for s, n in zip(self.sources, tokens_S) if n)
