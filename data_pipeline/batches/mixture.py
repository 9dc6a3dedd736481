"""Several datasets as one: which sample of which source comes at a position is a function, not a state.

Weights are quantised to a block of 65,536 positions, in which each source's samples are spread evenly, and blocks
repeat. How often a source was drawn before any position is then arithmetic, and that count is the position in the
source's own shuffled order. What changes the weights (a stage of a curriculum, a source that is used up) starts a new
segment of positions, which carries the counts on.

Shapes: S sources, L = 65,536 positions of a block; any shape of positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.batches.contiguous import TokenSplit
from data_pipeline.batches.mixture_plan import BLOCK, Segment, Stage, interleave, quantise
from data_pipeline.batches.reading import Pieces, Samples, bounds, ranges


@dataclass(frozen=True)
class Source:
    """A dataset and how much of it is wanted.

    weight: its share of the tokens, relative to the others'; None: its own number of tokens. max_epochs: passes over it
    after which it is left out, its weight falling to the others in proportion; None: no limit.
    """

    name: str
    dataset: TokenSplit
    weight: float | None = None
    max_epochs: float | None = None


@dataclass(frozen=True)
class Usage:
    """What was read of one source before a position. share: its part of all tokens since the mixture started."""

    name: str
    samples: int
    tokens: int
    epochs: float
    share: float


class MixtureDataset(Samples):
    """Reads like a `TokenSplit` and has its attributes, by positions from `start` on.

    A sample's index is its index in its source plus the samples of the sources before it.

    Attributes, beside those of a `TokenSplit`, but `plan_version`: sources; order_version, raised with every change of
    the code that draws otherwise from the same sources; changes, [(position, what happens there)] for people;
    positions_total, the end of the data if every source has a limit, else None; samples_per_epoch: of all sources.

    Args:
        stages: with growing positions.
        start: position at which this mixture takes over from another one.
        consumed: samples read of each source before that, by the content_sha256 of its dataset: an epoch that another
            mixture began is finished without repeating anything.

    Raises ValueError, naming the source, for sources that do not fit each other and for impossible weights.
    """

    order_version = 1

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        stages: Sequence[Stage] = (),
        start: int = 0,
        consumed: Mapping[str, int] | None = None,
    ):
        if not sources:
            raise ValueError("a mixture needs at least one source")
        _check_fit(sources)
        self.sources, self.stages, self.start = list(sources), list(stages), start
        self._datasets = datasets = [source.dataset for source in sources]
        first = datasets[0]
        self.path = " and ".join(str(d.path) for d in datasets)
        self.seq_len, self.packing = first.seq_len, first.packing
        self.n_vocab, self.eot_id = first.n_vocab, first.eot_id
        self.tokens_total = sum(d.tokens_total for d in datasets)
        self.documents_total = sum(d.documents_total for d in datasets)
        self.inputs_total = sum(d.inputs_total for d in datasets)
        self._first_index_S = bounds([d.samples_per_epoch for d in datasets])
        self._first_token_S = bounds([sum(file.n_tokens for file in d.files) for d in datasets])
        self._set_files([file for d in datasets for file in d.files])
        self.samples_per_epoch = int(self._first_index_S[-1])
        self.content_sha256 = _joined(d.content_sha256 for d in datasets)
        self.manifest_sha256 = _joined(d.manifest_sha256 for d in datasets)
        self._limits = [
            None if s.max_epochs is None else int(s.max_epochs * s.dataset.samples_per_epoch) for s in sources
        ]
        # What was read of sources that are gone is kept: they may come back.
        self.consumed = {d.content_sha256: 0 for d in datasets} | {sha: int(n) for sha, n in (consumed or {}).items()}
        self.changes: list[tuple[int, str]] = []
        self.weights = self._weights({s.name: float(s.dataset.tokens_total if s.weight is None else s.weight)
                                      for s in sources}, "the weights of the sources")  # fmt: skip
        self._segments = self._plan()
        self._starts = np.array([segment.start for segment in self._segments])

    @property
    def tokenizer(self):
        return self._datasets[0].tokenizer

    def order(self, positions: np.ndarray) -> np.ndarray:
        """Index of the sample at each position, int64, in [0, samples_per_epoch)."""
        source, count = self.locate(positions)
        indices = np.empty_like(count)
        for s in np.unique(source):
            chosen = source == s
            indices[chosen] = self._first_index_S[s] + self._datasets[s].order(count[chosen])
        return indices

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which source a position draws from, and how many samples were drawn of it before; int64, of any shape."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < self.start:
            raise ValueError(f"position {positions.min()}: this mixture starts at {self.start}")
        if self.positions_total is not None and positions.size and positions.max() >= self.positions_total:
            raise ValueError(f"position {positions.max()}: the data end at {self.positions_total}")
        source, count = np.empty_like(positions), np.empty_like(positions)
        segments = np.searchsorted(self._starts, positions, side="right") - 1
        for i in np.unique(segments):
            segment, chosen = self._segments[i], segments == i
            blocks, place = np.divmod(positions[chosen] - segment.start, BLOCK)
            source[chosen] = s = segment.source_L[place]
            count[chosen] = segment.base_S[s] + blocks * segment.counts_S[s] + segment.rank_L[place]
        return source, count

    def pieces(self, indices: np.ndarray) -> Pieces:
        source_N = np.searchsorted(self._first_index_S, indices, side="right") - 1
        parts, counts_N = [], np.empty_like(indices)
        for s in np.unique(source_N):
            (chosen,) = (source_N == s).nonzero()
            part = self._datasets[s].pieces(indices[chosen] - self._first_index_S[s])
            parts.append((chosen, self._first_token_S[s], part))
            counts_N[chosen] = part.counts_N
        first = bounds(counts_N)
        starts_P, lengths_P = np.empty(first[-1], np.int64), np.empty(first[-1], np.int64)
        for chosen, first_token, part in parts:
            places = ranges(first[chosen], part.counts_N)
            starts_P[places] = np.where(part.starts_P < 0, part.starts_P, part.starts_P + first_token)
            lengths_P[places] = part.lengths_P
        return Pieces(starts_P, lengths_P, counts_N)

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Tokens int64 [N, T+1] at global positions, int64 [N]; for contiguous packing only."""
        batch = self.micro_batch(self.order(positions))
        return np.concatenate([batch["input_ids"], batch["labels"][:, -1:]], axis=1)

    def counts(self, position: int) -> np.ndarray:
        """Samples drawn of each source before a position, int64 [S], those of earlier mixtures included."""
        assert position >= self.start, (position, self.start)
        return self._segments[np.searchsorted(self._starts, position, side="right") - 1].before(position)

    def usage(self, position: int) -> list[Usage]:
        """What was read of each source before a position. Tokens are exact for contiguous packing, else the source's
        mean per sample times its samples.
        """
        counts_S, per_S = self.counts(position), self._tokens_per_sample()
        tokens_S = (counts_S - self._consumed_S()) * per_S
        shares_S = tokens_S / max(tokens_S.sum(), 1)
        return [
            Usage(s.name, int(n), round(n * per), float(n / s.dataset.samples_per_epoch), float(share))
            for s, n, per, share in zip(self.sources, counts_S, per_S, shares_S)
        ]

    def consumed_at(self, position: int) -> dict[str, int]:
        """What another mixture that takes over at a position needs: `consumed`."""
        now = zip(self._datasets, self.counts(position).tolist())
        return self.consumed | {dataset.content_sha256: count for dataset, count in now}

    def shares(self, position: int) -> str:
        """The weights in force at a position, for people."""
        return self._shares(self._segments[np.searchsorted(self._starts, position, side="right") - 1])

    def state(self) -> dict:
        """All that decides the order from `start` on, as JSON values: for checkpoints, and for `differences`."""
        return {
            "start": self.start,
            "consumed": self.consumed,
            "sources": [
                {
                    "name": s.name,
                    "content_sha256": s.dataset.content_sha256,
                    "weight": round(self.weights[s.name], 12),
                    "max_epochs": s.max_epochs,
                }
                for s in self.sources
            ],
            "stages": [{"position": t.position, "weights": dict(t.weights)} for t in self.stages],
        }

    def _consumed_S(self) -> np.ndarray:
        return np.array([self.consumed[d.content_sha256] for d in self._datasets])

    def _tokens_per_sample(self) -> np.ndarray:
        return np.array([d.inputs_total / d.samples_per_epoch for d in self._datasets])

    def _weights(self, weights: Mapping[str, float], what: str) -> dict[str, float]:
        """Shares of tokens by name, summing to 1."""
        unknown = [name for name in weights if name not in {s.name for s in self.sources}]
        if unknown:
            raise ValueError(
                f"{what} name {unknown[0]!r}, which is no source; there are {', '.join(s.name for s in self.sources)}"
            )
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{what}: {name}={weight} must be a finite number, 0 or more")
        total = sum(weights.values())
        if total <= 0:
            raise ValueError(f"{what} are all 0; give at least one source a weight above 0")
        return {s.name: weights.get(s.name, 0.0) / total for s in self.sources}

    def _plan(self) -> list[Segment]:
        changes = [(self.start, "", self.weights)]
        for number, stage in enumerate(self.stages, 1):
            if number > 1 and stage.position <= self.stages[number - 2].position:
                raise ValueError(f"stage {number} starts at {stage.position}, not after the one before it")
            weights, why = self._weights(stage.weights, f"the weights of stage {number}"), f"stage {number} starts"
            if stage.position <= self.start:  # over already, or in force from the start
                changes = [(self.start, why if stage.position == self.start else "", weights)]
            else:
                changes.append((stage.position, why, weights))
        base_S = self._consumed_S()
        segments: list[Segment] = []
        for number, (position, why, weights) in enumerate(changes):
            end = changes[number + 1][0] if number + 1 < len(changes) else None
            while end is None or position < end:
                segment = self._segment(position, why, weights, base_S)
                if segment is None:
                    self.positions_total = position
                    self.changes.append((position, "the data end: every source that has a weight is used up"))
                    return segments or [self._segment(position, why, weights, base_S, limited=False)]
                if segments or why:
                    self.changes.append((position, f"{why}; now {self._shares(segment)}"))
                segments.append(segment)
                limited = [s for s, limit in enumerate(self._limits) if limit is not None and segment.counts_S[s]]
                over, s = min(((self._over(segment, s), s) for s in limited), default=(None, None))
                if over is not None and (end is None or over < end):
                    position, source = over, self.sources[s]
                    why = f"{source.name} is used up after {source.max_epochs:g} epochs"
                elif end is not None:
                    position = end
                else:
                    return segments
                base_S = segment.before(position)
        return segments

    def _segment(self, start, why, weights, base_S, limited: bool = True) -> Segment | None:
        """None if no source that has a weight has samples left. limited: heed that."""
        shares_S = np.array([weights[s.name] for s in self.sources]) / self._tokens_per_sample()
        for s, limit in enumerate(self._limits):
            if limited and limit is not None and base_S[s] >= limit:
                shares_S[s] = 0
        if not shares_S.any():
            return None
        # By content: the order in which the sources are listed decides nothing.
        order_S = np.argsort([d.content_sha256 for d in self._datasets])
        counts_S = np.empty(len(order_S), np.int64)
        counts_S[order_S] = quantise(shares_S[order_S] / shares_S.sum())
        source_L, rank_L = interleave(counts_S[order_S])
        return Segment(start, base_S, order_S[source_L], rank_L, counts_S)

    def _over(self, segment: Segment, s: int) -> int:
        """Position at which a source would be asked for a sample more than it may give."""
        blocks, rank = divmod(self._limits[s] - int(segment.base_S[s]), int(segment.counts_S[s]))
        return segment.start + blocks * BLOCK + int(np.flatnonzero(segment.source_L == s)[rank])

    def _shares(self, segment: Segment) -> str:
        tokens_S = segment.counts_S * self._tokens_per_sample()
        return ", ".join(f"{s.name} {n / tokens_S.sum():.2%}" for s, n in zip(self.sources, tokens_S) if n)


def _check_fit(sources: Sequence[Source]) -> None:
    first = sources[0]
    seen: dict[str, str] = {}
    names: set[str] = set()
    for source in sources:
        dataset = source.dataset
        if source.name in names:
            raise ValueError(f"two sources are named {source.name!r}; give each a name of its own")
        names.add(source.name)
        if dataset.content_sha256 in seen:
            raise ValueError(
                f"sources {seen[dataset.content_sha256]} and {source.name} are the same data; name it once, with the "
                "sum of the weights"
            )
        seen[dataset.content_sha256] = source.name
        ours, theirs = (d.manifest.tokenizer for d in (dataset, first.dataset))
        if ours["sha256"] != theirs["sha256"]:
            raise ValueError(
                f"source {source.name} was made with tokenizer {ours['name']} ({ours['sha256'][:12]}), {first.name} "
                f"with {theirs['name']} ({theirs['sha256'][:12]}): prepare both with one tokenizer"
            )
        if source.max_epochs is not None and not source.max_epochs * dataset.samples_per_epoch >= 1:
            raise ValueError(f"source {source.name}: max_epochs {source.max_epochs} is less than one sample")
        for key in ("seq_len", "packing"):
            if getattr(dataset, key) != getattr(first.dataset, key):
                raise ValueError(
                    f"source {source.name} has {key} {getattr(dataset, key)}, {first.name} "
                    f"{getattr(first.dataset, key)}; open both alike"
                )


def _joined(hashes) -> str:
    hashes = list(hashes)
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
