"""Requests to stop that reach a process as signals."""

from __future__ import annotations

import signal


class StopRequest:
    """A flag that SIGTERM and Ctrl-C set, so that the step is finished and saved.

    A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number: int, _frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def close(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
