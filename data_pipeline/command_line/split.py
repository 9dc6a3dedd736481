"""A command line of two programs: the options of one's own, and those that are handed on to another."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable


def split_arguments(argv: list[str], kind: type, handed_on: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the words of a command line that are options of `kind`, and the others.

    Args:
        argv: The command line without the program, both kinds of options mixed.
        kind: A dataclass of options.
        handed_on: Names without a dot of options that are the other program's; its others have one.

    Raises:
        ValueError: One is nearly an option of `kind`.
    """
    hints = typing.get_type_hints(kind)
    own = {field.name.replace("_", "-"): hints[field.name] for field in dataclasses.fields(kind)}
    flags = {name for name, hint in own.items() if hint is bool}
    mine: list[str] = []
    others: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, _ = word.removeprefix("--").partition("=")
        plain = name.replace("_", "-")
        if plain in ("help", "h", "-h") and word.startswith("-"):
            mine.append(word)
        elif word.startswith("--") and (plain in own or plain.removeprefix("no-") in flags):
            mine.append(word)
            if not equals and plain.removeprefix("no-") not in flags:
                mine += [value for value in [next(words, None)] if value is not None]
        else:
            _check_spelling(word, name, plain, own, handed_on)
            others.append(word)
    return mine, others


def _check_spelling(word: str, name: str, plain: str, own: Iterable[str], handed_on: Iterable[str]) -> None:
    if not word.startswith("--") or "." in name or plain in handed_on:
        return
    if near := difflib.get_close_matches(plain, own, n=1, cutoff=0.8):
        raise ValueError(f"unrecognized option --{name}; did you mean --{near[0]}?")
