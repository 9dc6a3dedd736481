"""The rules that say what becomes of a text: normalization, filters, limits of length, and the settings of shards.

Which documents are held out for validation is decided in `shards/held_out.py`.
"""

import functools
import hashlib
import importlib
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipeline.printable import first_line


@dataclass(frozen=True)
class Rules:
    """What becomes of a text.

    Raises:
        ValueError: A value is impossible, or a filter cannot be imported.
    """

    normalization: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = None
    """A Unicode form, or None."""
    min_characters: int = 0
    """Shorter documents are dropped."""
    max_characters: int | None = None
    """Longer documents are dropped."""
    filters: tuple[str, ...] = ()
    """MODULE:FUNCTION each. The function is called with the text; True keeps it, False drops it, and a string replaces
    it."""
    deduplicate: bool = True
    """Drop exact copies of earlier documents."""
    validation_fraction: float = 0.01
    """The share of the documents that is held out; their hash decides."""
    shard_tokens: int = 1 << 26
    """The most tokens of a shard."""
    max_documents: int | None = None
    """Stop after so many documents."""

    def __post_init__(self):
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction {self.validation_fraction}: must be at least 0 and less than 1")
        for name, least in (("shard_tokens", 1), ("max_documents", 1), ("min_characters", 0), ("max_characters", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} {value}: must be at least {least}")
        if self.max_characters is not None and self.min_characters > self.max_characters:
            raise ValueError(
                f"min_characters {self.min_characters}: must not be more than max_characters, which is "
                f"{self.max_characters}"
            )
        if self.normalization not in (None, "NFC", "NFD", "NFKC", "NFKD"):
            raise ValueError(f"normalization {self.normalization!r}: must be NFC, NFD, NFKC or NFKD")
        _ = self.filter_versions  # filters that cannot be loaded are refused now

    @functools.cached_property
    def filter_versions(self) -> dict[str, list]:
        """What each filter was when the rules were made; a file that is edited after that is another filter."""
        return {name: _filter_version(name) for name in self.filters}

    def fingerprint(self) -> dict:
        """Return everything about the rules that decides on the bytes, as JSON values.

        What decides about a filter is the file of its module, and the module's `VERSION`, which should change with
        whatever else the filter uses.
        """
        return asdict(self) | {"filters": [[name, *self.filter_versions[name]] for name in self.filters]}

    def check_filters(self) -> None:
        """Check that the filters are those that the rules were made with.

        Raises:
            ValueError: A filter is another one.
        """
        for name, version in self.filter_versions.items():
            if _filter_version(name) != version:
                raise ValueError(f"filter {name}: was changed while the texts were being prepared; start again")


def load_filter(name: str) -> Callable[[str], bool | str]:
    """Return the function that MODULE:FUNCTION names.

    Raises:
        ValueError: There is no such function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module's own code raises
        raise ValueError(
            f"filter {name!r}: expected MODULE:FUNCTION that can be imported ({first_line(error)})"
        ) from error
    if not callable(found):
        raise ValueError(f"filter {name!r}: {function} is not a function")
    return found


def _filter_version(name: str) -> list:
    load_filter(name)
    module = sys.modules[name.partition(":")[0]]
    file = getattr(module, "__file__", None)
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else None
    return [digest, repr(getattr(module, "VERSION", None))]


def apply_rules(text: str, rules: Rules, filters: list[tuple[str, Callable]]) -> tuple[str, str | None]:
    """Return the text as it will be tokenized, and the reason why it is dropped, or None.

    Args:
        text: A document.
        rules: What becomes of it.
        filters: (name, function) of each filter of the rules.

    Raises:
        ValueError: A filter fails, or returns something that is no answer.
    """
    if rules.normalization:
        text = unicodedata.normalize(rules.normalization, text)
    for name, function in filters:
        try:
            answer = function(text)
        except Exception as error:
            raise ValueError(f"filter {name}: {first_line(error)}, on a text that begins {text[:40]!r}") from error
        if isinstance(answer, str):
            text = answer
        elif not isinstance(answer, (bool, np.bool_)):
            raise ValueError(
                f"filter {name}: returned {answer!r:.40}, on a text that begins {text[:40]!r}; expected True "
                f"to keep it, False to drop it, or a text in its place"
            )
        elif not answer:
            return text, name
    if not text:
        return text, "empty"
    if len(text) < rules.min_characters:
        return text, "short"
    if rules.max_characters is not None and len(text) > rules.max_characters:
        return text, "long"
    return text, None
