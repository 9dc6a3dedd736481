"""`launch/watch.py`: follow a run on a terminal until it ends, or say once how it is."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.text import Text

from data_pipeline.command_line import check_ranges, option, positional, print_line, ranged
from data_pipeline.printable import printable
from gptoss_dist.tracking.live.screen import plain, screen
from gptoss_dist.tracking.live.snapshot import RunWatch, Snapshot


@dataclass
class WatchOptions:
    """Follow a training run from any machine that sees its folder; nothing is written there, and no lock is taken."""

    run: str = positional("RUN")
    """Folder of a run, such as runs/quickstart."""
    once: bool = option(False)
    """Print a few plain lines and end, as also happens where there is no terminal."""
    interval: float = ranged(2.0, at_least=0.1)
    """Seconds between two looks."""

    def __post_init__(self) -> None:
        check_ranges(self)


def watch(options: WatchOptions) -> None:
    """Follow a run until Ctrl-C; end when the run is over.

    Raises:
        ValueError: There is no such run, or its folder has been deleted or renamed meanwhile.
    """
    console = Console()
    looks = RunWatch(options.run)
    if options.once or not console.is_terminal or os.environ.get("TERM", "dumb") == "dumb":
        print_line(plain(looks.look()))
        return
    with console.status(Text(printable(f"reading {options.run}"))):
        last = looks.look()
    full = Live(screen(last, console), console=console, screen=True, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), full as live:
        while not last.state.is_over:
            time.sleep(options.interval)
            last = _next(looks, last)
            live.update(screen(last, console), refresh=True)
    console.print(screen(last, console))  # what was on the alternate screen is gone with it


def _next(looks: RunWatch, before: Snapshot) -> Snapshot:
    """Return the next snapshot, or the one before with a line of why there is none at the moment."""
    try:
        return looks.look()
    except OSError as error:  # of a network file system that stutters
        reason = printable(error.strerror or str(error))
        return _with_message(before, f"the folder cannot be read at the moment: {reason}")


def _with_message(snapshot: Snapshot, text: str) -> Snapshot:
    return dataclasses.replace(snapshot, messages=[*snapshot.messages, text])
