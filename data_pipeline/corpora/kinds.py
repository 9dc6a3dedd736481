"""Which files hold text, by their names: what is taken of a folder, and what is left.

A folder of text also holds other things. Hidden files and folders, cards, which describe the data, and files of unknown
kinds are left out and counted, because half a corpus that is missing without a word is found out by nobody.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from data_pipeline.corpora.compression import COMPRESSIONS

TEXT_SUFFIXES = (".txt", ".md")
LINES_SUFFIXES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = (".parquet", ".arrow")
"""Kinds of files that are compressed inside."""
SUFFIXES = (*TEXT_SUFFIXES, *LINES_SUFFIXES, ".json", *TABLE_SUFFIXES)
KNOWN = f"{', '.join(SUFFIXES)}; all but {' and '.join(TABLE_SUFFIXES)} also with {', '.join(COMPRESSIONS)}"

DATASET_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files beside the data of a Hugging Face dataset."""
PREPARED_FILE = "tokenizer.gptoss.json"
"""A file that only a prepared dataset has, which is no text."""
PREPARED_NAMES = (PREPARED_FILE, "manifest.json", "prepare.json", "verified.json")
"""What of a prepared dataset could be taken for records; an adopted one lies beside its owner's own files."""
UNFINISHED_ENDING, UNFINISHED_FILE = ".preparing", "unfinished.txt"
"""How the folder of a dataset ends that is being prepared, and a file in it."""
_CARD = re.compile(r"(readme|licen[cs]e)([-_.].*)?", re.IGNORECASE)

HIDDEN, CARDS = "hidden", "cards (README, LICENSE and the like)"
LINKS, BROKEN = "links to what is there already", "broken links"
NO_FILES, PREPARED = "no regular files", "prepared datasets"
UNREADABLE, FOLDERS = "folders that cannot be read", "folders"
PREPARED_FILES = "that describe prepared datasets"
CHAINED = "with `::` in their names, at which fsspec would part them"


def suffixes_of(name: str) -> tuple[str, str]:
    """Return the ending that tells the kind of the content and that of the compression, in small letters.

    They are `.jsonl` and `.zst` for `a.JSONL.zst`, and `.txt` and nothing for `a.txt`.
    """
    path = PurePosixPath(name.lower())
    if path.suffix in COMPRESSIONS:
        return PurePosixPath(path.stem).suffix, path.suffix
    return path.suffix, ""


def is_known(name: str) -> bool:
    """Return whether a file of this name can be read."""
    kind, compression = suffixes_of(name)
    return kind in SUFFIXES and not (compression and kind in TABLE_SUFFIXES)


def why_left_out(name: str) -> str | None:
    """Return why a file that was found, not named, is left out, as `LeftOut` counts it; None where it is taken."""
    if name.startswith("."):
        return HIDDEN
    is_prose = suffixes_of(name)[0] not in (*LINES_SUFFIXES, ".json", *TABLE_SUFFIXES)
    if (is_prose and _CARD.fullmatch(name)) or name in DATASET_FILES:
        return CARDS
    if is_known(name):
        return None
    return "".join(suffixes_of(name)) or "without an ending"


@dataclass
class LeftOut:
    """Numbers of files and folders that are left out, by reason."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str) -> None:
        """Count one."""
        self.counts[reason] += 1

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """Return the counts in one line: `100 .csv, 3 hidden`."""
        most = self.counts.most_common()
        listed = [f"{count:,} {reason}" for reason, count in most[:12]]
        if rest := sum(count for _, count in most[12:]):
            listed.append(f"{rest:,} others")
        return ", ".join(listed)
