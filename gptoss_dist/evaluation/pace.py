"""When a long evaluation says how far it is."""

from __future__ import annotations

import time

EVERY_S = 30.0


class Pace:
    """Asked after each piece of work, it answers every 30 seconds that something should be said.

    Args:
        speaks: Whether this process says anything at all.
    """

    def __init__(self, speaks: bool) -> None:
        self._speaks, self._said = speaks, time.monotonic()

    def is_due(self) -> bool:
        """Return whether it is time for a line, and begin to count anew if so."""
        if not self._speaks or time.monotonic() - self._said < EVERY_S:
            return False
        self._said = time.monotonic()
        return True
