"""What is read of a record: the column with the text, or with token ids that some tokenizer made already."""

import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_pipeline.printable import shown

MOST_BYTES = 256 << 20
"""The longest text of one document, line or row."""
TOO_LONG = (
    f"longer than {MOST_BYTES >> 20} MiB, the most that one document may have; cut it into documents, one a line of a "
    f".jsonl file"
)


@dataclass(frozen=True)
class Malformed:
    """A record that holds no text."""

    where: str
    """The file, and the line or row."""
    reason: str

    def __str__(self) -> str:
        return f"{shown(self.where)}: {shown(self.reason)}"


@dataclass(frozen=True)
class Column:
    """The column of records that is read."""

    name: str
    ids: bool = False
    """It holds lists of token ids, not texts."""

    @property
    def option(self) -> str:
        """The option that names it."""
        return "--ids-column" if self.ids else "--text-column"

    @property
    def key(self) -> str:
        """A text that differs for what is read otherwise."""
        return f"{self.name} (ids)" if self.ids else self.name

    @cached_property
    def quoted(self) -> bytes:
        """The name as a key in JSON."""
        return json.dumps(self.name, ensure_ascii=False).encode("utf-8", "replace")

    def checked(self, value: object, where: str) -> str | np.ndarray | Malformed:
        """Return a value of the column as a document."""
        if value is None:  # what is missing is empty, which `prepare` drops and counts
            return np.empty(0, np.int64) if self.ids else ""
        if self.ids:
            return self._checked_ids(value, where)
        if not isinstance(value, str):
            return Malformed(where, f"column {self.name!r} holds {type(value).__name__}, not text")
        if len(value) > MOST_BYTES:
            return Malformed(where, TOO_LONG)
        return value

    def _checked_ids(self, value: object, where: str) -> np.ndarray | Malformed:
        wrong = Malformed(where, f"column {self.name!r} holds {type(value).__name__}, not a list of token ids")
        if not isinstance(value, (list, np.ndarray)):
            return wrong
        if not len(value):
            return np.empty(0, np.int64)
        try:
            ids = np.asarray(value)
        except (ValueError, OverflowError):  # lists of lists of different lengths
            return wrong
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            inner = type(value[0]).__name__
            return Malformed(where, f"column {self.name!r} holds a list of {inner}, not one of token ids")
        return ids.astype(np.int64, copy=False)

    def check_names(self, names: list[str], where: str) -> None:
        """Check that a table has the column, once.

        Raises:
            ValueError: It has not; the message names the file and what there is.
        """
        if self.name not in names:
            raise ValueError(f"{shown(where)}: {self.missing(names)}")
        if names.count(self.name) > 1:
            raise ValueError(
                f"{shown(where)}: {names.count(self.name)} columns are called {self.name!r}; rename them, that it is "
                f"clear which one holds the {'ids' if self.ids else 'text'}"
            )

    def missing(self, names: list[str]) -> str:
        """Return a message that there is no such column, and which there are."""
        listed = ", ".join(map(repr, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        hint = f"choose one with {self.option}"
        if not self.ids and "input_ids" in names:
            hint += ", or take token ids with --ids-column input_ids and the --tokenizer that made them"
        return f"no column {self.name!r}, only {listed or 'none at all'}; {hint}"
