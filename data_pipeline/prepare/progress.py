"""How far a long preparation is: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from collections.abc import Callable
from typing import Any

_LINE_EVERY_SECONDS = 10.0


class Progress:
    """A display of documents, tokens and speed.

    Args:
        total: Bytes of input, 0 when not known.
        report: Takes the lines where there is no terminal.
    """

    def __init__(self, total: int, report: Callable[[str], None]):
        self.total, self.report = total, report
        self.bytes = self.documents = self.tokens = 0
        self.start = self.reported = time.monotonic()
        self._bar: Any = None  # rich's, where there is a terminal

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), refresh_per_second=4)
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total or None)
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def count(self, documents: int, tokens: int) -> None:
        """Show the numbers of documents and tokens that are done so far."""
        self.documents, self.tokens = documents, tokens
        self._show()

    def finish_part(self, size: int) -> None:
        """Show that another part, of `size` bytes, is complete."""
        self.bytes += size
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        seconds = max(now - self.start, 1e-9)
        millions = self.tokens / 1e6
        text = f"{self.documents:,} documents, {millions:,.1f} M tokens, {millions / seconds:.2f} M tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.bytes, description=text)
        elif now - self.reported >= _LINE_EVERY_SECONDS:
            self.reported = now
            if self.total and self.bytes:
                left = seconds * (self.total - self.bytes) / self.bytes
                text += f", {100 * self.bytes / self.total:.0f} % of the input, {_duration(left)} left"
            self.report(f"  {text}")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
