"""What a corpus consists of: sources of text, and the parts of them that one process reads at a time."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.corpora.columns import Malformed
from data_pipeline.corpora.files import File
from data_pipeline.printable import shown

# A large file is cut into about 64 parts, neither too small to be worth a file nor too large to be done again. Those of
# .jsonl are equal and, beyond four, a multiple of four (so down to half of MIN_PART_BYTES), that 2 or 4 processes end
# at one time. How a file is cut depends on nothing but its size, so that other files may come and go.
_PARTS, MIN_PART_BYTES, _MAX_PART_BYTES = 64, 8 << 20, 128 << 20


@dataclass(frozen=True)
class Part:
    """What one process reads at a time."""

    name: str
    """What people read, without the directory."""
    fingerprint: str
    """A text that changes when the content does."""
    size: int
    """Bytes to be read, 0 when not known."""
    read: Callable[[], Iterator[str | np.ndarray | Malformed]]
    """The function that starts one pass over the records. It can be pickled. It raises ValueError, naming the file, for
    what cannot be read at all."""

    def __post_init__(self):
        object.__setattr__(self, "name", shown(self.name))


@dataclass(frozen=True)
class TextSource:
    """A corpus that can be read any number of times."""

    spec: str
    """What the user asked for."""
    kind: str
    """It is pystdlib, installed, synthetic, needles, files or huggingface."""
    description: str
    """Where the text really comes from."""
    parts: list[Part]
    """What is read, in this order or side by side."""
    left_out: str = ""
    """What was found beside it and is not read, for people."""
    options: frozenset[str] = frozenset()
    """Names of the arguments of `open_source` that mean something for it."""

    def __post_init__(self):
        # Here sources become text: for people, the manifest and the record of the request.
        object.__setattr__(self, "spec", shown(self.spec))
        object.__setattr__(self, "description", shown(self.description))

    @property
    def fingerprint(self) -> str:
        """A text that changes when the inputs do."""
        return hashlib.sha256(json.dumps([part.fingerprint for part in self.parts]).encode()).hexdigest()

    def documents(self) -> Iterator[str]:
        """Yield all texts in order.

        Raises:
            ValueError: A record is malformed.
        """
        for part in self.parts:
            for record in part.read():
                if isinstance(record, Malformed):
                    raise ValueError(str(record))
                if not isinstance(record, str):
                    raise ValueError(f"{self.spec}: holds token ids, not text")
                yield record


def grouped(files: list[File]) -> Iterator[list[File]]:
    """Yield groups of neighbours that together hold about MIN_PART_BYTES."""
    group, size = [], 0
    for file in files:
        group.append(file)
        size += file.size
        if size >= MIN_PART_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def part_bytes(file: File) -> int:
    """Return how many bytes each part of a large file has."""
    count = -(-file.size // min(max(-(-file.size // _PARTS), MIN_PART_BYTES), _MAX_PART_BYTES))
    if count > 4:
        count = -(-count // 4) * 4
    return -(-file.size // max(count, 1))


def fingerprint_of(files: Iterable[File], *rest: object) -> str:
    """Return a text that changes when one of the files does, or what is read of them."""
    return json.dumps([[[file.path, file.size, file.version] for file in files], *rest])
