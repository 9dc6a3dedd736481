"""Files of JSON lines that survive a crash, a full disk and damage at any byte."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import orjson

logger = logging.getLogger(__name__)

LONGEST_LINE = 2**26
"""Bytes of the longest line that is read; one that is longer is damaged."""


class JsonLinesWriter:
    """A writer of records, each in one write.

    A file that cannot be written, or that stops to take lines, costs lines and one message, never the training.

    Args:
        path: The file. What is there already is continued.
        message: What tells the user; by default a warning in the log.
    """

    def __init__(self, path: Path, message: Callable[[str], None] = logger.warning) -> None:
        self._path, self._message = path, message
        self._file: IO[bytes] | None = None
        self._warned = self._torn = False
        try:
            # A named pipe without a reader is an error at once, rather than a wait without an end.
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
            self._file = open(descriptor, "ab", buffering=0)  # noqa: SIM115 -- lives as long as the tracker
            self._torn = not _ends_with_newline(path)
        except OSError as error:
            self._warn(error.strerror or str(error))

    def append(self, record: dict) -> None:
        """Write one record as a whole line."""
        if self._file is None:
            return
        data = json.dumps(record, allow_nan=False).encode() + b"\n"
        if self._torn:  # a crash or a full disk cut the last line short: do not let it swallow this one
            data = b"\n" + data
        try:
            written = self._file.write(data) or 0
            self._torn = written < len(data)
            if self._torn:
                self._warn(f"only {written} of {len(data)} bytes were written")
        except OSError as error:
            self._warn(error.strerror or str(error))

    def close(self) -> None:
        """Close the file; nothing can be appended any more."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            self._message(f"{self._path}: {problem}; training goes on without these lines")


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[dict, int]]:
    """Yield the complete lines behind `offset`, each with the offset behind it.

    A line that is not a JSON object of a sane size and depth is an empty record. What is not an ordinary file has no
    lines.

    Raises:
        OSError: The file cannot be read.
    """
    if not path.is_file():
        return
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            for line, length in _complete_lines(file):
                offset += length
                yield _parse(line), offset
    except OSError as error:  # that of a read does not say which file
        raise OSError(error.errno, error.strerror, str(path)) from None


def is_line_start(path: Path, offset: int) -> bool:
    """Return whether a complete line could begin at `offset`: it lies within the file, at its start or behind a line.

    Raises:
        OSError: The file cannot be read.
    """
    if offset == 0:
        return True
    if not path.is_file() or not 0 < offset <= path.stat().st_size:
        return False
    with open(path, "rb") as file:
        file.seek(offset - 1)
        return file.read(1) == b"\n"


def _complete_lines(file: IO[bytes]) -> Iterator[tuple[bytes | None, int]]:
    """Yield each line that ends, or None in place of one that is too long, and its length.

    A line may come in pieces: while somebody writes it, a reader can see its beginning before its end.
    """
    while line := file.readline(LONGEST_LINE):
        length = len(line)
        while not line.endswith(b"\n"):
            rest = file.readline(LONGEST_LINE)
            if not rest:
                return
            length += len(rest)
            line = line + rest if length <= LONGEST_LINE else rest
        yield (line if length <= LONGEST_LINE else None), length


def _parse(line: bytes | None) -> dict:
    try:
        record = _loads(line) if line is not None else None
    except (ValueError, RecursionError):
        record = None
    return record if isinstance(record, dict) else {}


def _loads(line: bytes) -> object:
    try:
        return orjson.loads(line)  # five times as fast
    except ValueError:  # it refuses NaN, integers of more than 64 bits and lone surrogates
        return json.loads(line)


def _ends_with_newline(path: Path) -> bool:
    if not path.is_file():
        return True  # a device
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"
