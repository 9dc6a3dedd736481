"""What MLflow has acknowledged of a run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.disk import replacing
from data_pipeline.foreign import Count, read_json
from gptoss_dist.tracking.jsonl import is_line_start
from gptoss_dist.tracking.records import JOURNAL_FILE, METRICS_FILE, SYSTEM_FOLDER

CURSOR_FILE = "tracking/cursor.json"


@dataclass
class Cursor:
    """How far MLflow has acknowledged the two files of a run.

    It is written after the acknowledgement, so that a crash in between repeats something and never skips it.
    """

    uri: str | None = None
    """Where MLflow is, without a password."""
    database: str | None = None
    """Path of the database file of a sqlite URI from the run's folder, which a moved or copied checkout keeps."""
    folder: str | None = None
    """Where the run's folder was."""
    run_id: str | None = None
    metrics_offset: Count = 0
    journal_offset: Count = 0
    system_offsets: dict[str, Count] = field(default_factory=dict)
    """Of the files of system metrics, by name."""

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
            cursor = read_json(path, cls, remedy="it is written again")
            cursor._check(run_dir)
        except (OSError, ValueError) as error:
            message(f"{error}; MLflow is sent the whole run again")
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
        self.run_id, self.metrics_offset, self.journal_offset, self.system_offsets = None, 0, 0, {}

    def _check(self, run_dir: Path) -> None:
        for name, offset in ((METRICS_FILE, self.metrics_offset), (JOURNAL_FILE, self.journal_offset)):
            if not is_line_start(run_dir / name, offset):
                raise ValueError(f"{run_dir / CURSOR_FILE}: no line of {name} begins at {offset}")
        for name, offset in list(self.system_offsets.items()):
            if not is_line_start(run_dir / SYSTEM_FOLDER / name, offset):
                del self.system_offsets[name]
