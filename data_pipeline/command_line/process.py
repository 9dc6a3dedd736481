"""What a command needs of its process: that any text can be read and printed, whatever the locale says."""

from __future__ import annotations

import io
import os
import sys

_RESTARTED = "GPTOSS_DIST_RESTARTED"
"""Set in the second start, so that there is no third where Python ignores its variables."""


def accept_any_text(*, restart: bool = False) -> None:
    """Let files, names and streams be UTF-8, and printing never fail.

    A locale without UTF-8 (LC_ALL=C with PYTHONUTF8=0) makes Python read files and the command line as ASCII. That is
    decided when the interpreter starts, so it starts again, in the same process.

    Args:
        restart: Whether this process is the command's own, so that it may start again.
    """
    if restart and sys.getfilesystemencoding() != "utf-8" and _RESTARTED not in os.environ:
        os.environ["PYTHONUTF8"] = os.environ[_RESTARTED] = "1"
        os.execv(sys.executable, sys.orig_argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # also where PYTHONIOENCODING asks for ASCII
