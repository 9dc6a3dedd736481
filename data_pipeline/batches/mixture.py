"""Several datasets as one: which sample of which source comes at a position is a function, not a state.

The plan of a mixture says which source each position draws from (`mixture_plan.py`); here samples are read by it.

Shapes: S sources, N samples, P spans of tokens; any shape of positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.batches.mixture_plan import MixturePlan, PlannedSource, Stage
from data_pipeline.batches.reading import Samples, Spans, bounds, ranges
from data_pipeline.batches.token_split import TokenSplit


@dataclass(frozen=True)
class WeightedDataset:
    """A dataset and how much of it is wanted."""

    name: str
    dataset: TokenSplit
    weight: float | None = None
    """The dataset's share of the tokens, relative to the others'; None is its own number of tokens."""
    max_epochs: float | None = None
    """Passes over the dataset after which it is left out, and its weight falls to the others in proportion; None is no
    limit."""


@dataclass(frozen=True)
class Usage:
    """What was read of one source before a position."""

    name: str
    samples: int
    tokens: int
    epochs: float
    share: float
    """The source's part of all tokens since the mixture started."""


class MixtureDataset(Samples):
    """Several datasets that are read like one `TokenSplit`, by positions from `start` on.

    A sample's index is its index in its source plus the samples of the sources before it. The attributes are those of a
    `TokenSplit` without `plan_version`, and the following.

    Args:
        sources: The datasets, with their weights.
        stages: Changes of the weights, with growing positions.
        start: Position at which this mixture takes over from another one.
        consumed: Samples read of each source before that, by the content_sha256 of its dataset: an epoch that another
            mixture began is finished without repeating anything.

    Attributes:
        sources: The datasets, with their weights.
        changes: Positions where the weights change, and what happens there in words.
        positions_total: The position where the data end if every source has a limit, else None.
        samples_per_epoch: The samples of all sources together.

    Raises:
        ValueError: Sources do not fit each other, or weights are impossible. The message names the source.
    """

    order_version = 1
    """Raised with every change of the code that draws otherwise from the same sources."""

    def __init__(
        self,
        sources: Sequence[WeightedDataset],
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
        # What was read of sources that are gone is kept: they may come back.
        self.consumed = {d.content_sha256: 0 for d in datasets} | {sha: int(n) for sha, n in (consumed or {}).items()}
        self.plan = MixturePlan(
            [
                PlannedSource(
                    s.name, d.content_sha256, d.inputs_total / d.samples_per_epoch, d.samples_per_epoch, s.max_epochs
                )
                for s, d in zip(sources, datasets)
            ],
            {s.name: float(s.dataset.tokens_total if s.weight is None else s.weight) for s in sources},
            self.stages,
            start=start,
            consumed_S=self._consumed_S(),
        )
        self.weights, self.changes = self.plan.weights, self.plan.changes
        self.positions_total = self.plan.positions_total

    @property
    def tokenizer(self):
        """The tokenizer that all sources were made with."""
        return self._datasets[0].tokenizer

    def order(self, positions: np.ndarray) -> np.ndarray:
        """Return the index of the sample at each position, int64, in [0, samples_per_epoch)."""
        source, count = self.locate(positions)
        indices = np.empty_like(count)
        for s in np.unique(source):
            chosen = source == s
            indices[chosen] = self._first_index_S[s] + self._datasets[s].order(count[chosen])
        return indices

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each position's source, and how many samples were drawn of it before; see `MixturePlan.locate`."""
        return self.plan.locate(positions)

    def spans(self, indices: np.ndarray) -> Spans:
        """Return the spans of samples of all sources, in the order of the indices."""
        source_N = np.searchsorted(self._first_index_S, indices, side="right") - 1
        parts, counts_N = [], np.empty_like(indices)
        for s in np.unique(source_N):
            (chosen,) = (source_N == s).nonzero()
            part = self._datasets[s].spans(indices[chosen] - self._first_index_S[s])
            parts.append((chosen, self._first_token_S[s], part))
            counts_N[chosen] = part.counts_N
        first = bounds(counts_N)
        starts_P, lengths_P = np.empty(first[-1], np.int64), np.empty(first[-1], np.int64)
        for chosen, first_token, part in parts:
            places = ranges(first[chosen], part.counts_N)
            starts_P[places] = np.where(part.starts_P < 0, part.starts_P, part.starts_P + first_token)
            lengths_P[places] = part.lengths_P
        return Spans(starts_P, lengths_P, counts_N)

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Return tokens int64 [N, T+1] at global positions, int64 [N]; for contiguous packing only."""
        batch = self.micro_batch(self.order(positions))
        return np.concatenate([batch["input_ids"], batch["labels"][:, -1:]], axis=1)

    def counts(self, position: int) -> np.ndarray:
        """Return the samples drawn of each source before a position, int64 [S], those of earlier mixtures included."""
        return self.plan.counts(position)

    def usage(self, position: int) -> list[Usage]:
        """Return what was read of each source before a position.

        Tokens are exact for contiguous packing; otherwise they are the source's mean per sample times its samples.
        """
        counts_S, per_S = self.counts(position), self._tokens_per_sample()
        tokens_S = (counts_S - self._consumed_S()) * per_S
        shares_S = tokens_S / max(tokens_S.sum(), 1)
        return [
            Usage(s.name, int(n), round(n * per), float(n / s.dataset.samples_per_epoch), float(share))
            for s, n, per, share in zip(self.sources, counts_S, per_S, shares_S)
        ]

    def consumed_at(self, position: int) -> dict[str, int]:
        """Return the argument `consumed` of another mixture that takes over at a position."""
        now = zip(self._datasets, self.counts(position).tolist())
        return self.consumed | {dataset.content_sha256: count for dataset, count in now}

    def shares(self, position: int) -> str:
        """Return the shares of tokens at a position, in words."""
        return self.plan.shares(position)

    def state(self) -> dict:
        """Return all that decides the order from `start` on, as JSON values: for checkpoints, and for `differences`."""
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


def _check_fit(sources: Sequence[WeightedDataset]) -> None:
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
