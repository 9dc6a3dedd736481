"""Rank 0 has the questions, and all ranks work on them, in rounds.

    rank 0   harness -> requests -> batches   | round: batch 0 | round: batch 2 |        | end
    rank 1   serve                            | round: batch 1 | nothing left   |        | end

So only rank 0 needs the harness, its tasks and their data, and what goes wrong with these happens there alone. In a
round each rank computes one batch of one kind: ranks that hold parts of one model (`in_step`) make the same forward
passes. Rank 0 looks at the clock before each round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline import Tokenizer
from gptoss_dist.distributed.collectives import all_gather_objects, results_of_all_ranks
from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.evaluation.continuing import Continuation, continue_prompts
from gptoss_dist.evaluation.scoring import IDLE_PLAIN, IDLE_SHARED, Batch, Request, Score, plan, score

PROMPTS_AT_ONCE = 32
"""Prompts that a rank continues in a round, as one batch."""
_MESSAGE_EVERY_S = 10.0


class TimeIsUp(Exception):
    """An evaluation took longer than it may."""


@dataclass
class Team:
    """The ranks that share a model, or hold copies of it. Rank 0 asks, and the others `serve` meanwhile."""

    ranks: Ranks
    model: Any
    """A `GptOss`, or one that an engine has sharded, in evaluation mode."""
    tokenizer: Tokenizer
    batch_tokens: int
    in_step: bool = False
    """Whether ranks hold parts of one model, so that all must make the same forward passes."""
    deadline: float = float("inf")
    """When rank 0 begins no further round, on the clock `time.monotonic`."""
    group: dist.ProcessGroup | None = None
    """A group of all ranks to wait in, if not the default one."""
    message: Callable[[str], None] = lambda text: None
    """Hears how far a long evaluation is."""
    _is_in_round: bool = False

    # Rank 0 ----------------------------------------------------------------------------------------------------------

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Return the score of each request; for rank 0.

        Raises:
            TimeIsUp: The deadline has passed.
        """
        found: dict[int, Score] = {}
        shared, plain = plan(requests, self.batch_tokens)
        for batches, idle in ((shared, IDLE_SHARED), (plain, IDLE_PLAIN)):
            self._rounds(batches, idle, found, f"of {len(requests):,} requests scored")
        return [found[index] for index in range(len(requests))]

    def continue_prompts(self, continuations: Sequence[Continuation]) -> list[list[int]]:
        """Return the new tokens of each prompt; for rank 0.

        Raises:
            TimeIsUp: The deadline has passed.
        """
        found: dict[int, list[int]] = {}
        order = sorted(
            range(len(continuations)), key=lambda i: (continuations[i].settings.key, -len(continuations[i].ids))
        )
        jobs: list[list[tuple[int, Continuation]]] = []
        for index in order:
            key = continuations[index].settings.key
            if not jobs or jobs[-1][0][1].settings.key != key or self._is_full(jobs[-1]):
                jobs.append([])
            jobs[-1].append((index, continuations[index]))
        while jobs:
            # In step, all ranks write at most equally many tokens.
            key = jobs[0][0][1].settings.key
            alike = [job for job in jobs if job[0][1].settings.key == key]
            idle = [(-1, alike[0][0][1])] if self.in_step else []
            self._rounds(alike, idle, found, f"of {len(continuations):,} prompts continued")
            jobs = jobs[len(alike) :]
        return [found[index] for index in range(len(continuations))]

    def end(self, mistake: str | None = None) -> None:
        """Let the other ranks go on; for rank 0, however the evaluation ended.

        Args:
            mistake: Why it failed; `serve` then raises ValueError with this text.
        """
        # A round that failed has ended for the others too.
        if self.ranks.world_size > 1 and not self._is_in_round:
            self._broadcast(mistake)

    def _rounds(self, jobs: Sequence[Any], idle: Any, found: dict[int, Any], what: str) -> None:
        width, told = self.ranks.world_size, time.monotonic()
        for start in range(0, len(jobs), width):
            if time.monotonic() > self.deadline:
                raise TimeIsUp
            taken = list(jobs[start : start + width])
            taken += [idle] * (width - len(taken))
            self._is_in_round = True
            if width > 1:
                self._broadcast(taken)
            for results in self._work(taken):
                found.update((index, result) for index, result in results if index >= 0)
            self._is_in_round = False
            if time.monotonic() - told > _MESSAGE_EVERY_S:
                told = time.monotonic()
                self.message(f"{len(found):,} {what}")

    # The others ------------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Work on what rank 0 asks until it ends.

        Raises:
            ValueError: Rank 0 ended with a mistake.
            OSError: A round failed on any rank.
        """
        while isinstance(jobs := self._broadcast(None), list):
            self._work(jobs)
        if jobs is not None:
            raise ValueError(jobs)

    # All -------------------------------------------------------------------------------------------------------------

    def _broadcast(self, jobs: list[Any] | str | None) -> list[Any] | str | None:
        holder: list[Any] = [jobs]
        dist.broadcast_object_list(holder, group=self.group, device=torch.device("cpu"))
        return holder[0]

    def _work(self, jobs: list[Any]) -> list[list[tuple[int, Any]]]:
        """Do this rank's job of a round; return the results of all ranks."""
        mine = jobs[self.ranks.rank]
        if self.in_step:  # a rank that fails within a forward pass cannot tell the others, which wait there
            return all_gather_objects(self._do(mine), self.group)
        return results_of_all_ranks(lambda: self._do(mine), self.group)

    def _do(self, job: Any) -> list[tuple[int, Any]]:
        if isinstance(job, Batch):
            return list(score(self.model, job, self.ranks.device))
        if not job:
            return []
        largest = self._largest if self.in_step else None
        texts = continue_prompts(
            self.model,
            self.tokenizer,
            [entry for _, entry in job],
            batch_tokens=self.batch_tokens,
            largest=largest,
        )
        return [(index, ids) for (index, _), ids in zip(job, texts)]

    def _is_full(self, job: list[tuple[int, Continuation]]) -> bool:
        """Return whether a job has no room for another prompt, none of which is longer than its first one."""
        longest = job[0][1]
        columns = len(longest.ids) + longest.settings.max_new_tokens
        return len(job) == PROMPTS_AT_ONCE or (len(job) + 1) * columns > self.batch_tokens

    def _largest(self, number: int) -> int:
        return max(all_gather_objects(number, self.group))
