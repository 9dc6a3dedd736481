"""Steps that went wrong, and what ends a run because of them."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the message is for the user, and checkpoints are intact."""


class SkipGuard:
    """A count of the steps whose update was skipped, which ends the run after too many in a row."""

    def __init__(self, limit: int, total: int = 0) -> None:
        self.limit, self.total, self.in_a_row = limit, total, 0

    def observe(self, step: int, skipped: bool, loss: float, grad_norm: float) -> None:
        """Note the outcome of a step."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.total += skipped
        if skipped:
            log.warning("step %d skipped: loss %s, gradient norm %s", step, loss, grad_norm)

    def check(self, step: int, loss: float) -> None:
        """Raise TrainingError after `limit` skipped steps in a row.

        Args:
            step: The last step, for the message.
            loss: Its loss, for the message.

        Raises:
            TrainingError: The last `limit` steps were all skipped.
        """
        if self.in_a_row >= self.limit:
            raise TrainingError(
                f"{self.in_a_row} steps in a row had a non-finite loss or gradient (last: step {step}, loss {loss}); "
                "the last checkpoint is intact: lower optim.lr, or inspect the data"
            )
