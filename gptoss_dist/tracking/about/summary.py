"""How a run stands, counted while it trains: what its note says and what costs are logged."""

from __future__ import annotations

import logging
import os
import re
import time
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gptoss_dist.tracking.about.facts import RunFacts
from gptoss_dist.tracking.about.note import Standing, render
from gptoss_dist.tracking.jsonl import read_lines
from gptoss_dist.tracking.recorded.columns import read_columns
from gptoss_dist.tracking.records import JOURNAL_FILE, METRICS_FILE, Event, operation

log = logging.getLogger(__name__)

AVERAGED_STEPS = 20
"""Of the training loss in the note."""
_MOST_EVENTS = 200
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
    """

    def __init__(self, facts: RunFacts, step: int, tokens: int) -> None:
        self.facts = facts
        self.events: deque[Event] = deque(maxlen=_MOST_EVENTS)
        self.counts: Counter[str] = Counter()
        """How many events of each kind there were."""
        self.best: tuple[float, int] | None = None
        """The lowest validation loss and its step."""
        self._last: tuple[float, int] | None = None
        self._step, self._tokens, self._skipped = step, tokens, 0
        self._losses: deque[float] = deque(maxlen=AVERAGED_STEPS)
        self._newest: Mapping[str, float] = {}
        self._began = time.monotonic()
        self._hours_before = self._gpu_hours_before = 0.0
        self._exaflops_per_token = facts.flops_per_token / 1e18
        self._gpu_hours_per_s = facts.processes / 3600

    def read_back(self) -> None:
        """Take over what earlier processes of the run recorded; what cannot be read counts nothing."""
        folder = self.facts.folder
        try:
            costs = last_values(folder / METRICS_FILE, ("progress/hours", "progress/gpu_hours"))
            self._hours_before = costs.get("progress/hours", 0.0)
            self._gpu_hours_before = costs.get("progress/gpu_hours", 0.0)
            columns = read_columns(folder, log.debug)
            rows, losses = columns.points("loss/val")
            kept = columns.steps[rows] <= self._step
            rows, losses = rows[kept], losses[kept]
            if len(rows):
                best = int(np.argmin(losses))
                self.best = float(losses[best]), int(columns.steps[rows[best]])
                self._last = float(losses[-1]), int(columns.steps[rows[-1]])
            for line, _ in read_lines(folder / JOURNAL_FILE):
                if isinstance(record := operation(line), Event):
                    self.event(record)
        except Exception as error:  # the note must never end a run
            log.warning("what was recorded before is not in the note: %s", error)

    @property
    def last_step(self) -> int:
        """The last step that is known to be done."""
        return self._step

    def event(self, event: Event) -> int:
        """Note an event, and return how many of its kind there were."""
        self.events.append(event)
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
        seconds = time.monotonic() - self._began
        return {
            "progress/exaflops": self._tokens * self._exaflops_per_token,
            "progress/hours": self._hours_before + seconds / 3600,
            "progress/gpu_hours": self._gpu_hours_before + seconds * self._gpu_hours_per_s,
        }

    def validation(self, step: int, loss: float) -> dict[str, float]:
        """Note a validation loss.

        Returns:
            `loss/val_best`, and `progress/val_tokens` and `progress/val_exaflops`: an axis for validation losses, which
            charts can only draw over what was logged at the same steps.
        """
        self._step, self._last = step, (loss, step)
        if self.best is None or loss < self.best[0]:
            self.best = loss, step
        return {
            "loss/val_best": self.best[0],
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
            tokens_per_s=self._newest.get("perf/tokens_per_s"),
            mfu=self._newest.get("perf/mfu"),
            skipped_steps=int(self._newest.get("optim/skipped_steps", 0)),
        )

    def note(self, state: str) -> str:
        """Return the run's note as Markdown."""
        return render(self.facts, self.standing(state), self.events)


def last_values(path: Path, names: tuple[str, ...]) -> dict[str, float]:
    """Return the last number of some metrics near the end of a file of metrics, on whatever branch.

    Raises:
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        tail = file.read().decode(errors="replace")
    found = {name: re.findall(rf'"{re.escape(name)}": ?([-+.\deE]+)', tail) for name in names}
    last = {name: float(values[-1]) for name, values in found.items() if values}
    return {name: value for name, value in last.items() if np.isfinite(value)}
