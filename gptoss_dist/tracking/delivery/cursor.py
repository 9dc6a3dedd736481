"""What MLflow has acknowledged of a run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.disk import replacing
from gptoss_dist.tracking.jsonl import is_line_start
from gptoss_dist.tracking.records import JOURNAL_FILE, METRICS_FILE

CURSOR_FILE = "tracking/cursor.json"
_LARGEST = 2**16
"""Bytes of a cursor file that are read."""


@dataclass
class Cursor:
    """How far MLflow has acknowledged the two files of a run.

    It is written after the acknowledgement, so that a crash in between repeats something and never skips it.
    """

    uri: str | None = None
    """Where MLflow is, without a password."""
    database: str | None = None
    """Path of the database file of a sqlite URI from the run's folder, which a moved or copied checkout keeps."""
    run_id: str | None = None
    metrics_offset: int = 0
    journal_offset: int = 0

    @classmethod
    def load(cls, run_dir: Path, message: Callable[[str], None]) -> Cursor:
        """Read the cursor of a run.

        One that is missing begins anew, and so does one that is damaged or does not fit the files: everything is sent
        again, which MLflow takes once.
        """
        path = run_dir / CURSOR_FILE
        if not os.path.lexists(path):
            return cls()
        try:
            if not path.is_file() or path.stat().st_size > _LARGEST:  # a pipe or a device has no end
                raise ValueError(path)
            values = json.loads(path.read_bytes())
            known = {field.name for field in dataclasses.fields(cls)}
            cursor = cls(**{name: value for name, value in values.items() if name in known})
            cursor._check(run_dir)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            message(f"{path} is damaged ({type(error).__name__}): MLflow is sent the whole run again")
            return cls()
        return cursor

    def save(self, run_dir: Path) -> None:
        """Write the cursor, whole or not at all.

        Raises:
            OSError: It cannot be written.
        """
        with replacing(run_dir / CURSOR_FILE) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self)))

    def restart(self) -> None:
        """Forget what was acknowledged: the run is to be sent whole."""
        self.run_id, self.metrics_offset, self.journal_offset = None, 0, 0

    def _check(self, run_dir: Path) -> None:
        for text in (self.uri, self.database, self.run_id):
            if not isinstance(text, str | None):
                raise TypeError(text)
        for name, offset in ((METRICS_FILE, self.metrics_offset), (JOURNAL_FILE, self.journal_offset)):
            if not isinstance(offset, int) or isinstance(offset, bool) or not is_line_start(run_dir / name, offset):
                raise ValueError(offset)
