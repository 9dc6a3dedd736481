"""Values from files with the types that were asked for, or one line that says which value is not of its type."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from data_pipeline.foreign.files import MOST_BYTES, read_text
from data_pipeline.foreign.parsing import parse_json
from data_pipeline.printable import printable, shortened

T = TypeVar("T")

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""A number of things: not negative, and no larger than 64 bits hold."""


def read_json(
    path: str | Path,
    kind: type[T],
    *,
    most: int = MOST_BYTES,
    finite: bool = False,
    remedy: str = "correct it",
) -> T:
    """Return what a JSON file holds.

    Args:
        path: The file.
        kind: The type of it: a `msgspec.Struct`, a dataclass, or a type such as `dict[str, int]`.
        most: How many bytes the file may have.
        finite: Refuse NaN and infinite numbers, wherever they are.
        remedy: What messages say is to be done.

    Raises:
        ValueError: It cannot be read, is not JSON, or not of this type; one line that names file, key and value. The
            cause is the OSError where there was one.
    """
    return convert(parse_json(read_text(path, most=most), path), kind, path, finite=finite, remedy=remedy)


def convert(value: Any, kind: type[T], origin: object, *, finite: bool = False, remedy: str = "correct it") -> T:
    """Return plain values as what `kind` says.

    Args:
        value: What `parse_json` returns.
        kind: That of `read_json`.
        origin: What messages call the values, such as the path of their file.
        finite: That of `read_json`.
        remedy: What messages say is to be done.

    Raises:
        ValueError: They are not of this type; one line that names `origin`, key and value.
    """
    if finite and (wrong := _not_finite(value)):
        raise ValueError(f"{printable(origin)}: {wrong} must be a finite number; {remedy}")
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{printable(origin)}: {_explained(value, kind, str(error))}; {remedy}") from None


def _explained(value: Any, kind: Any, message: str) -> str:
    """Return what msgspec says in words of this project, with the value that it is about.

    msgspec writes "Expected `int`, got `str` - at `$.data.sizes[3]`", and `[...]` there for some key of an object.
    """
    what, _, place = message.partition(" - at `$")
    key, found = "", value
    steps: list[str | int] = []
    for name, number in re.findall(r"\.([^.\[\]`]+)|\[(\d+|\.\.\.)\]", place):
        step: str | int = int(number) if number.isdecimal() else name or _guilty(value, kind, steps, found)
        key += f"[{step}]" if number else f".{step}" if key else str(step)
        found = found[step]
        steps.append(step)
    if missing := re.search("(?:missing required|contains unknown) field `(.+)`", what):
        full = f"{key}.{missing[1]}" if key else missing[1]
        return f"{printable(full)} is missing" if "missing" in what else f"{printable(full)} is not known here"
    what = re.sub("^Expected (.+), got (.+)$", r"must be \1, not \2", what)
    what = printable(re.sub("^Expected (.+)$", r"must be \1", what))
    return f"{printable(key)}={_shown(found)} {what}" if place else re.sub("^must be", "it must be", what)


def _guilty(value: Any, kind: Any, steps: list[str | int], container: dict[str, Any]) -> str:
    """Return the first key of the object at `steps` in `value` whose entry alone is refused."""

    def with_only(part: Any, left: list[str | int], name: str) -> Any:
        if not left:
            return {name: part[name]}
        copy = part.copy()
        copy[left[0]] = with_only(part[left[0]], left[1:], name)
        return copy

    for name in container:
        try:
            msgspec.convert(with_only(value, steps, name), kind)
        except msgspec.ValidationError:
            return name
    raise AssertionError("msgspec refuses an object of which it takes each entry")


def _not_finite(value: Any) -> str | None:
    """Return `key=value` of a number that is NaN or infinite; None if there is none."""
    left = [("", value)]
    while left:
        key, item = left.pop()
        if isinstance(item, float) and not math.isfinite(item):
            return f"{printable(key)}={item}"
        if isinstance(item, dict):
            left += [(f"{key}.{name}" if key else name, inner) for name, inner in item.items()]
        elif isinstance(item, list):
            left += [(f"{key}[{number}]", inner) for number, inner in enumerate(item)]
    return None


def _shown(value: Any) -> str:
    """Return a value, shortened."""
    if isinstance(value, list | dict):
        return "[...]" if isinstance(value, list) else "{...}"
    return printable(shortened(json.dumps(value)))
