"""Files of JSON lines that survive a crash, or a full disk, at any byte."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


class JsonLinesWriter:
    """A writer of records, each in one write; a failing disk costs lines and one warning, never the training."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 -- lives as long as the tracker
        self._torn = not _ends_with_newline(path)
        self._warned = False

    def append(self, record: dict) -> None:
        """Write one record as a whole line."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        if self._torn:  # a crash or a full disk cut the last line short: do not let it swallow this one
            line = b"\n" + line
        try:
            written = self._file.write(line)
            self._torn = written < len(line)
            problem = f"only {written} of {len(line)} bytes were written" if self._torn else None
        except OSError as error:
            problem = str(error)
        if problem and not self._warned:
            self._warned = True
            logger.warning("%s: %s; training goes on without these lines", self._path, problem)

    def close(self) -> None:
        """Close the file; nothing can be appended any more."""
        self._file.close()


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[dict, int]]:
    """Yield the complete lines behind `offset`, each with the offset behind it.

    A damaged line is an empty record.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            yield record if isinstance(record, dict) else {}, offset


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"
