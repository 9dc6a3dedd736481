"""How many tokens each expert got, row by row in `expert_tokens.jsonl`: too many numbers for MLflow.

A line is `{"first_step": 201, "step": 300, "tokens": [[...], ...]}`: tokens of each expert (inner) in each layer
(outer), summed over the steps from `first_step` to `step`; or `{"event": "resume", "step": 250}` where training went
back to step 250. Read it with `read_expert_tokens`.

Shapes: L layers, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.disk import move
from gptoss_dist.tracking.jsonl import JsonLinesWriter
from gptoss_dist.tracking.recorded.experts import EXPERT_TOKENS_FILE, read_expert_tokens
from gptoss_dist.tracking.records import free_number

logger = logging.getLogger(__name__)

__all__ = ["EXPERT_TOKENS_FILE", "ExpertTokens", "read_expert_tokens"]

_NAMED_EXPERTS = 8
"""Dead experts that a warning names."""


class ExpertTokens:
    """A writer of sums of each expert's tokens: it appends a row whenever the step is a multiple of `every`.

    Only rank 0 has one. Steps that a killed process had not written yet are in no row.

    Args:
        run_dir: Folder of the run. A fresh start moves an earlier run's file there aside (`expert_tokens.1.jsonl`),
            under the number that `Tracker` is about to give to that run's `metrics.jsonl`: construct this one first.
        every: Steps between rows; 0 writes none.
        resumed_step: The step of the checkpoint that the run goes on from; None is a fresh start.
        message: What tells the user that the file cannot be written.
    """

    def __init__(
        self,
        run_dir: str | Path,
        every: int,
        resumed_step: int | None = None,
        message: Callable[[str], None] = logger.warning,
    ) -> None:
        path = Path(run_dir) / EXPERT_TOKENS_FILE
        if resumed_step is None:
            try:
                _set_aside(path)
            except OSError as error:
                message(f"{path} cannot be set aside ({error}): it continues another run's")
        self._every = every
        self._sum_LE: Tensor | None = None
        self._first_step = self._step = 0
        self._dead: list[tuple[int, int]] = []
        # Rows of an abandoned branch have to be marked as such even by a run that adds none.
        self._writer = JsonLinesWriter(path, message) if every or path.exists() else None
        if self._writer and resumed_step is not None:
            self._writer.append({"event": "resume", "step": resumed_step})

    def add(self, step: int, counts_LE: Tensor) -> str | None:
        """Count one step; the device is read only where a row is due.

        Args:
            step: The optimizer step (1-based).
            counts_LE: Tokens of each expert in each layer in this step, over micro-batches and ranks.

        Returns:
            A warning, if `every` steps have passed without a token for some experts, and these are not the ones that
            the previous warning was about.
        """
        if not self._every:
            return None
        if self._sum_LE is None:
            self._first_step, self._sum_LE = step, torch.zeros_like(counts_LE, dtype=torch.int64)
        self._step = step
        self._sum_LE += counts_LE.detach().to(torch.int64)  # float32 would lose tokens beyond 2**24
        if step % self._every:
            return None
        whole = step - self._first_step + 1 == self._every  # else a resume began within it
        tokens = self._write()
        return self._warning(step, tokens) if whole else None

    def close(self) -> None:
        """Write what has been counted since the last row."""
        if self._writer is None:
            return
        try:
            if self._sum_LE is not None:
                self._write()
        finally:
            self._writer.close()
            self._writer = None

    def _write(self) -> list[list[int]]:
        assert self._sum_LE is not None and self._writer is not None, "add() before the first row"
        tokens = self._sum_LE.tolist()
        self._sum_LE = None
        self._writer.append({"first_step": self._first_step, "step": self._step, "tokens": tokens})
        return tokens

    def _warning(self, step: int, tokens: list[list[int]]) -> str | None:
        dead = [(layer, expert) for layer, row in enumerate(tokens) for expert, n in enumerate(row) if n == 0]
        changed, self._dead = dead != self._dead, dead
        if not (dead and changed):
            return None
        layers: dict[int, list[str]] = {}
        for layer, expert in dead[:_NAMED_EXPERTS]:
            layers.setdefault(layer, []).append(str(expert))
        names = "; ".join(f"layer {layer}: {', '.join(experts)}" for layer, experts in layers.items())
        more = ", ..." if len(dead) > _NAMED_EXPERTS else ""
        return (
            f"step {step}: {len(dead)} of {sum(map(len, tokens))} experts got no token in the last {self._every} steps "
            f"({names}{more}); raise loss.aux_coef, or train with model.router_selection_bias and "
            "loss.selection_bias_rate"
        )


def _set_aside(path: Path) -> None:
    if not path.exists():
        return
    # metrics.N.jsonl and expert_tokens.N.jsonl are to be of one run, also where an older one left only the former.
    n = free_number(path.parent, "expert_tokens.{}.jsonl", "metrics.{}.jsonl")
    move(path, path.with_name(f"expert_tokens.{n}.jsonl"))
