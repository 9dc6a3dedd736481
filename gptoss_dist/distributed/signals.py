"""Requests to stop that reach a process as signals."""

from __future__ import annotations

import signal

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""What launchers, terminals and batch systems send before they end a run: `sbatch --signal`, a lost connection."""


class StopRequest:
    """A flag that the signals `STOPPING` set, so that the step is finished and saved.

    A second Ctrl-C stops at once. SIGHUP stays ignored if this process was started to ignore it, under nohup. The
    others are heard even so: a batch script has launchers ignore SIGUSR1, of which they would die, and what they start
    inherits that.
    """

    def __init__(self) -> None:
        self.requested = False
        self.reason = "another process was asked to stop"
        """Who asked for it, in words; a signal that this process did not get is another's."""
        heard = [n for n in STOPPING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._handle) for number in heard}

    def _handle(self, number: int, _frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.request(f"signal {signal.Signals(number).name}")

    def request(self, reason: str) -> None:
        """Ask for a stop; the first reason counts."""
        if not self.requested:
            self.requested, self.reason = True, reason

    def close(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
