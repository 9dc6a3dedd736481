"""Log-likelihoods of continuations, in batches of like lengths, and each context computed once for all that follow it.

A question with four answers is four requests with one context. Plain batches would compute the context four times:

    shared      context rows          continuation rows, behind the keys and values of their context
                . . q1 q1 q1 q1       q1 | a a        q1 | b b b        q1 | c        q1 | d d
                q2 q2 q2 q2 q2 q2     q2 | a          q2 | b b          ...

    plain       x x x x x x x a a     requests whose context is theirs alone, the last tokens scored, padding behind
                x x x x a . . . .

Contexts end together, behind padding that no token sees, so that one pass fills the cache of all of them.

A batch is what one process computes. All batches of a kind are the same number of forward passes, so that processes
that hold parts of one model stay in step.

Shapes: B rows, R rows of continuations, T tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptoss_dist.model.kv_cache import KVCache
from gptoss_dist.model.transformer import IGNORE_INDEX, TokenScores

LEAST_SHARED = 16
"""Tokens of a context from which on it is computed once; behind a shorter one nothing would be won."""
MOST_COPIES = 32
"""Keys that are copied for the rows behind shared contexts, as a multiple of the tokens of a batch."""


@dataclass(frozen=True)
class Request:
    """A text of which the last tokens are scored."""

    ids: Sequence[int]
    """Its tokens, one of context at least."""
    counted: int
    """How many of the last ones are scored, 1 or more."""

    @property
    def context(self) -> tuple[int, ...]:
        """What comes before the scored tokens."""
        return tuple(self.ids[: len(self.ids) - self.counted])


class Score(NamedTuple):
    """What a model makes of a request."""

    log_likelihood: float
    """Of the scored tokens together, in nats."""
    is_greedy: bool
    """Whether each of them is the likeliest one."""


class Row(NamedTuple):
    """A request in a batch."""

    place: int
    """Where it is in the list of all requests."""
    request: Request


@dataclass(frozen=True)
class Batch:
    """What one process computes together."""

    groups: list[list[Row]]
    """Rows with one context in each group; a single group without one, if none is shared."""
    is_shared: bool

    @property
    def rows(self) -> list[Row]:
        """All of its rows."""
        return [row for group in self.groups for row in group]


def plan(requests: Sequence[Request], batch_tokens: int) -> tuple[list[Batch], list[Batch]]:
    """Return batches that share contexts, and plain ones, each kind from the longest to the shortest.

    Args:
        requests: What is to be scored.
        batch_tokens: The most tokens of a batch, padding included, unless a single request has more.
    """
    by_context: dict[tuple[int, ...], list[Row]] = defaultdict(list)
    for index, request in enumerate(requests):
        by_context[request.context].append(Row(index, request))
    shared = []
    for context, rows in by_context.items():
        if len(rows) > 1 and len(context) > LEAST_SHARED:
            most = max(1, MOST_COPIES * batch_tokens // len(context))
            shared += [rows[start : start + most] for start in range(0, len(rows), most)]
    alone = {row.place for rows in shared for row in rows}
    plain = [Row(index, request) for index, request in enumerate(requests) if index not in alone]
    return list(_shared_batches(shared, batch_tokens)), list(_plain_batches(plain, batch_tokens))


def _shared_batches(groups: list[list[Row]], batch_tokens: int) -> Iterator[Batch]:
    taken: list[list[Row]] = []
    # Sorted, so that the first context of a batch is its longest.
    for group in sorted(groups, key=lambda group: -len(group[0].request.context)):
        if taken and _is_too_large([*taken, group], batch_tokens):
            yield Batch(taken, True)
            taken = []
        taken.append(group)
    if taken:
        yield Batch(taken, True)


def _is_too_large(groups: list[list[Row]], batch_tokens: int) -> bool:
    longest, rows = len(groups[0][0].request.context), sum(map(len, groups))
    counted = max(row.request.counted for group in groups for row in group)
    return longest * len(groups) + counted * rows > batch_tokens or longest * rows > MOST_COPIES * batch_tokens


def _plain_batches(rows: list[Row], batch_tokens: int) -> Iterator[Batch]:
    rows = sorted(rows, key=lambda row: -len(row.request.ids))
    while rows:
        count = max(1, batch_tokens // (len(rows[0].request.ids) - 1))
        yield Batch([rows[:count]], False)
        rows = rows[count:]


IDLE_PLAIN = Batch([[Row(-1, Request((0, 0), 1))]], False)
IDLE_SHARED = Batch([[Row(-1, Request((0, 0, 0), 1))]], True)
"""What a process computes that has nothing to do while others do."""


@torch.no_grad()
def score(model: Any, batch: Batch, device: torch.device) -> list[tuple[int, Score]]:
    """Return the scores of a batch, each with the place of its request.

    Args:
        model: A `GptOss`, in evaluation mode. All processes that hold parts of it call this with batches of one kind.
        batch: From `plan`.
        device: Where the model's weights are.
    """
    scores = _score_shared(model, batch, device) if batch.is_shared else _score_plain(model, batch, device)
    # One copy to the host for all rows.
    sums = torch.stack((-scores.loss_BT.double().sum(1), (~scores.is_greedy_BT).double().sum(1))).tolist()
    return [(row.place, Score(log_likelihood, misses == 0.0)) for row, log_likelihood, misses in zip(batch.rows, *sums)]


def _padded(rows: Sequence[Sequence[int]], padding: int, device: torch.device, *, before: bool = False) -> Tensor:
    longest = max(map(len, rows))
    filled = [
        [*[padding] * (longest - len(row)), *row] if before else [*row, *[padding] * (longest - len(row))]
        for row in rows
    ]
    return torch.tensor(filled, device=device)


def _score_plain(model: Any, batch: Batch, device: torch.device) -> TokenScores:
    requests = [row.request for row in batch.rows]
    ids_BT = _padded([request.ids[:-1] for request in requests], 0, device)
    labels = [[IGNORE_INDEX] * (len(r.context) - 1) + list(r.ids[len(r.context) :]) for r in requests]
    labels_BT = _padded(labels, IGNORE_INDEX, device)
    scores = model(ids_BT, labels_BT, per_token=True)
    return _without_labels_as_greedy(scores, labels_BT)


def _score_shared(model: Any, batch: Batch, device: torch.device) -> TokenScores:
    contexts = [group[0].request.context[:-1] for group in batch.groups]  # the last one begins each continuation
    longest = max(map(len, contexts))
    capacity = longest + max(row.request.counted for row in batch.rows)
    cache = KVCache(model.config, capacity=capacity, padding=[longest - len(context) for context in contexts])
    model(_padded(contexts, 0, device, before=True), cache=cache, last_only=True)
    cache.select([number for number, group in enumerate(batch.groups) for _ in group])
    requests = [row.request for row in batch.rows]
    ids_RT = _padded([r.ids[len(r.context) - 1 : -1] for r in requests], 0, device)
    labels_RT = _padded([r.ids[len(r.context) :] for r in requests], IGNORE_INDEX, device)
    scores = model(ids_RT, labels_RT, cache=cache, per_token=True)
    return _without_labels_as_greedy(scores, labels_RT)


def _without_labels_as_greedy(scores: TokenScores, labels_BT: Tensor) -> TokenScores:
    return scores._replace(is_greedy_BT=scores.is_greedy_BT | (labels_BT == IGNORE_INDEX))
