"""How a run stands, counted while it trains: what its note says and what costs are logged."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gptoss_dist.tracking.about.facts import RunFacts
from gptoss_dist.tracking.about.note import LAST_ONLY, Standing, render
from gptoss_dist.tracking.jsonl import read_lines
from gptoss_dist.tracking.recorded.columns import read_columns
from gptoss_dist.tracking.records import JOURNAL_FILE, METRICS_FILE, Event, MetricsRow, metrics_record, operation

log = logging.getLogger(__name__)

AVERAGED_STEPS = 20
"""Of the training loss and the speed in the note."""
_RATE, _MFU = "perf/tokens_per_s", "perf/mfu"
_MOST_EVENTS = 50
"""Of each kind but checkpoints, of which the last one is kept."""
_TAIL = 2**18
"""Bytes at the end of `metrics.jsonl` in which the last counts of an earlier process are looked for."""


class Summary:
    """How a run stands.

    Hours count from when a process is ready to train until its last step, those of earlier processes and of steps that
    were lost included. Tokens and FLOPs are those of the weights: lost steps are not in them.

    Args:
        facts: What the run is.
        step: Steps done when this process began.
        tokens: Tokens seen by then.
        skipped_steps: Steps skipped by then.
    """

    def __init__(self, facts: RunFacts, step: int, tokens: int, skipped_steps: int = 0) -> None:
        self.facts = facts
        self._events: dict[str, deque[tuple[int, Event]]] = {}
        self.counts: Counter[str] = Counter()
        """How many events of each kind there were."""
        self.best: tuple[float, int] | None = None
        """The lowest validation loss and its step."""
        self._last: tuple[float, int] | None = None
        self._step, self._tokens, self._skipped_before = step, tokens, skipped_steps
        self._losses: deque[float] = deque(maxlen=AVERAGED_STEPS)
        self._speeds: dict[str, deque[float]] = {name: deque(maxlen=AVERAGED_STEPS) for name in (_RATE, _MFU)}
        self._newest: Mapping[str, float] = {}
        self._began = time.monotonic()
        self._hours_before = self._gpu_hours_before = 0.0
        self._exaflops_per_token = facts.flops_per_token / 1e18
        self._gpu_hours_per_s = facts.processes / 3600

    def read_back(self) -> None:
        """Take over what earlier processes of the run recorded; what cannot be read counts nothing."""
        for what, read in (
            ("costs", self._read_costs),
            ("validation losses", self._read_losses),
            ("events", self._read_events),
        ):
            try:
                read()
            except Exception as error:  # the note must never end a run
                log.warning("the %s recorded before are not in the note: %s", what, error)

    def _read_costs(self) -> None:
        costs = last_values(self.facts.folder / METRICS_FILE, ("progress/hours", "progress/gpu_hours"))
        self._hours_before = costs.get("progress/hours", 0.0)
        self._gpu_hours_before = costs.get("progress/gpu_hours", 0.0)

    def _read_losses(self) -> None:
        columns = read_columns(self.facts.folder, log.debug)
        rows, losses = columns.points("loss/val")
        kept = (columns.steps[rows] <= self._step) & np.isfinite(losses)
        rows, losses = rows[kept], losses[kept]
        if len(rows):
            best = int(np.argmin(losses))
            self.best = float(losses[best]), int(columns.steps[rows[best]])
            self._last = float(losses[-1]), int(columns.steps[rows[-1]])

    def _read_events(self) -> None:
        for line, _ in read_lines(self.facts.folder / JOURNAL_FILE):
            if isinstance(record := operation(line), Event):
                self.event(record)

    @property
    def events(self) -> list[Event]:
        """The newest events of each kind, in order."""
        numbered = [entry for entries in self._events.values() for entry in entries]
        return [event for _, event in sorted(numbered, key=lambda entry: entry[0])]

    @property
    def last_step(self) -> int:
        """The last step that is known to be done."""
        return self._step

    def event(self, event: Event) -> int:
        """Note an event, and return how many of its kind there were."""
        kept = self._events.setdefault(event.kind, deque(maxlen=1 if event.kind == LAST_ONLY else _MOST_EVENTS))
        kept.append((self.counts.total(), event))
        self.counts[event.kind] += 1
        return self.counts[event.kind]

    def step(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Count a step.

        Args:
            step: Its number.
            metrics: What it logs: among others `loss/train`, `progress/tokens`, `optim/skipped_steps`.

        Returns:
            `progress/exaflops`, `progress/hours` and `progress/gpu_hours`, cumulative.
        """
        self._step, self._newest = step, metrics
        self._tokens = int(metrics["progress/tokens"])
        self._losses.append(metrics["loss/train"])
        for name, newest in self._speeds.items():
            if name in metrics:
                newest.append(metrics[name])
        seconds = time.monotonic() - self._began
        return {
            "progress/exaflops": self._tokens * self._exaflops_per_token,
            "progress/hours": self._hours_before + seconds / 3600,
            "progress/gpu_hours": self._gpu_hours_before + seconds * self._gpu_hours_per_s,
        }

    def validation(self, step: int, loss: float) -> dict[str, float]:
        """Note a validation loss; one that is not finite is never the best.

        Returns:
            `loss/val_best`, if there is one; and `progress/val_tokens` and `progress/val_exaflops`, an axis for
            validation losses, which charts can only draw over what was logged at the same steps.
        """
        self._step, self._last = step, (loss, step)
        if np.isfinite(loss) and (self.best is None or loss < self.best[0]):
            self.best = loss, step
        return ({} if self.best is None else {"loss/val_best": self.best[0]}) | {
            "progress/val_tokens": self._tokens,
            "progress/val_exaflops": self._tokens * self._exaflops_per_token,
        }

    def standing(self, state: str) -> Standing:
        """Return how the run stands now."""
        hours = (time.monotonic() - self._began) / 3600
        losses = [loss for loss in self._losses if np.isfinite(loss)]
        return Standing(
            state=state,
            time=time.time(),
            step=self._step,
            tokens=self._tokens,
            exaflops=self._tokens * self._exaflops_per_token,
            hours=self._hours_before + hours,
            gpu_hours=self._gpu_hours_before + hours * self.facts.processes,
            train_loss=sum(losses) / len(losses) if losses else None,
            averaged_steps=len(losses),
            best=self.best,
            last=self._last,
            tokens_per_s=_median(self._speeds[_RATE]),
            mfu=_median(self._speeds[_MFU]),
            skipped_steps=int(self._newest.get("optim/skipped_steps", self._skipped_before)),
        )

    def note(self, state: str) -> str:
        """Return the run's note as Markdown."""
        return render(self.facts, self.standing(state), self.events, self.counts)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def last_values(path: Path, names: tuple[str, ...]) -> dict[str, float]:
    """Return the last finite number of some metrics near the end of a file of metrics, on whatever branch.

    Lines that are torn or damaged are passed over.

    Raises:
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        if file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL)):
            file.readline()  # to the start of a line
        offset = file.tell()
    last: dict[str, float] = {}
    for line, _ in read_lines(path, offset):
        if isinstance(row := metrics_record(line), MetricsRow):
            last |= {name: row.metrics[name] for name in names if np.isfinite(row.metrics.get(name, np.nan))}
    return last
