"""Progress of training: a bar on a terminal, plain timestamped lines everywhere else (files, pipes, launchers)."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_BAR_REFRESHES_PER_SECOND = 4


class Progress:
    """A display of how far training is, as a context manager.

    Args:
        total: The last step.
        start: Steps already done when this process began.
        interval_s: Seconds between lines where there is no terminal; the first and the last step always get one.
        stream: Where to write; standard error by default.
        enabled: False makes every method do nothing (ranks other than 0).
    """

    def __init__(
        self, total: int, start: int = 0, interval_s: float = 10.0, stream: TextIO | None = None, enabled: bool = True
    ) -> None:
        self._total, self._start, self._interval_s = total, start, interval_s
        self._stream: TextIO | None = (stream or sys.stderr) if enabled else None
        self._began = time.monotonic()
        self._next_line = self._began
        self._bar: RichProgress | None = None
        # A dumb terminal cannot move its cursor: the bar would become one line per refresh.
        if self._stream is not None and self._stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[values]}"),
                console=Console(file=self._stream),
                refresh_per_second=_BAR_REFRESHES_PER_SECOND,
                redirect_stdout=sys.stdout.isatty(),  # else what is piped elsewhere would land beside the bar
            )
            self._task = self._bar.add_task("train", total=total, completed=start, values="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, **values: float) -> None:
        """Report that `step` steps are done.

        Args:
            step: Optimizer steps done.
            **values: Numbers to show, such as `loss=2.5, tokens_per_s=5100`. A name in `_per_s` is a rate, shown with a
                metric prefix.
        """
        if self._bar is not None:
            self._bar.update(self._task, completed=step, values=_format(values))
        elif self._stream is not None:
            now = time.monotonic()
            if now >= self._next_line or step >= self._total:
                self._next_line = now + self._interval_s
                self._line(f"step {step}/{self._total} | {_format(values)}{self._remaining(step, now)}")

    def message(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(self._printable(text), markup=False, highlight=False, soft_wrap=True)
        elif self._stream is not None:
            self._line(text)

    def _line(self, text: str) -> None:
        try:
            print(f"[{time.strftime('%H:%M:%S')}] {self._printable(text)}", file=self._stream, flush=True)
        except (OSError, ValueError):  # the reader of a pipe is gone or the stream closed: training goes on unseen
            self._stream = None

    def _printable(self, text: str) -> str:
        """Return `text` with escapes for what the stream cannot encode, as under an ASCII locale."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def _remaining(self, step: int, now: float) -> str:
        done = step - self._start
        if done <= 0 or step >= self._total:
            return ""
        seconds = round((now - self._began) / done * (self._total - step))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return f" | {hours}:{minutes:02d}:{seconds % 60:02d} left"


def _format(values: dict[str, float]) -> str:
    parts = []
    for name, value in values.items():
        if name.endswith("_per_s"):
            parts.append(f"{_with_prefix(value)} {name.removesuffix('_per_s')}/s")
        else:
            parts.append(f"{name} {value:.4g}" if abs(value) < 1e-2 else f"{name} {value:.4f}")
    return " | ".join(parts)


def _with_prefix(value: float) -> str:
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.1f}{prefix}"
    return f"{value:.1f}"
