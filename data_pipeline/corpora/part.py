"""What a corpus consists of: sources of text, and the parts of them that one process reads at a time."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from data_pipeline.corpora.files import File
from data_pipeline.corpora.records import Malformed

# A large file is cut into about 64 parts, neither too small to be worth a file nor too large to be done again. Those of
# .jsonl are equal and, beyond four, a multiple of four (so down to half of MIN_PART_BYTES), that 2 or 4 processes end
# at one time. How a file is cut depends on nothing but its size, so that other files may come and go.
_PARTS, MIN_PART_BYTES, _MAX_PART_BYTES = 64, 8 << 20, 128 << 20


@dataclass(frozen=True)
class Part:
    """What one process reads at a time.

    name: for people, without the directory. fingerprint: changes when the content does. size: bytes to be read, 0 when
    not known. read: starts one pass over the records; it can be pickled. It raises ValueError for what cannot be read
    at all, naming the file.
    """

    name: str
    fingerprint: str
    size: int
    read: Callable[[], Iterator[str | Malformed]]


@dataclass(frozen=True)
class TextSource:
    """A corpus that can be read any number of times.

    spec: what the user asked for. kind: pystdlib, installed, synthetic, files or huggingface. description: where the
        text really comes from. parts: to be read in this order, or side by side.
    """

    spec: str
    kind: str
    description: str
    parts: list[Part]

    @property
    def fingerprint(self) -> str:
        """Changes when the inputs do."""
        return hashlib.sha256(json.dumps([part.fingerprint for part in self.parts]).encode()).hexdigest()

    def documents(self) -> Iterator[str]:
        """Return all texts in order.

        Raises ValueError at the first malformed record.
        """
        for part in self.parts:
            for record in part.read():
                if isinstance(record, Malformed):
                    raise ValueError(str(record))
                yield record


def grouped(files: list[File]) -> Iterator[list[File]]:
    """Neighbours that together hold about MIN_PART_BYTES."""
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
