"""Ranges of settings, declared beside their fields: checked in one place, and shown in `--help`.

    @dataclass
    class Settings:
        steps: int = ranged(1000, above=0)
        share: float = ranged(0.1, at_least=0, below=1)

        def __post_init__(self):
            check_ranges(self)

`Settings(steps=0)` then raises ValueError with the text `steps=0 must be positive`. What no setting can be, such as
infinite, is in values.py, and needs no declaration.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass
from typing import Any

from data_pipeline.command_line.values import check_sense


@dataclass(frozen=True)
class Range:
    """Limits of a number, of each number of a list, or of each value of a dictionary; those left out are None."""

    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None
    length: int | None = None
    """How many numbers a list has."""

    def __str__(self) -> str:
        """Return the range as a person reads it, such as `more than 0` or `in [0, 1)`."""
        low, high = self._ends()
        if low and high:
            text = f"in {'(' if self.at_least is None else '['}{low}, {high}{')' if self.at_most is None else ']'}"
        elif low:
            text = f"more than {low}" if self.at_least is None else f"{low} or more"
        else:
            text = f"less than {high}" if self.at_most is None else f"{high} or less"
        return text if self.length is None else f"{_NUMBERS[self.length]} numbers {text}"

    def _ends(self) -> tuple[str, str]:
        low = self.above if self.at_least is None else self.at_least
        high = self.below if self.at_most is None else self.at_most
        return _end(low), _end(high)

    def holds(self, number: float) -> bool:
        """Return whether one number lies within the limits; NaN never does."""
        return (
            (self.above is None or number > self.above)
            and (self.at_least is None or number >= self.at_least)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
            and number == number
        )

    def check(self, key: str, value: Any) -> None:
        """Check that `value` is within the limits. None is no value, and a text such as `auto` no number: both pass.

        Raises:
            ValueError: It is outside; the message has `key` and the remedy.
        """
        if isinstance(value, dict):
            for name, number in value.items():
                self.check(f"{key} of {name}", number)
            return
        numbers = value if isinstance(value, list | tuple) else [] if isinstance(value, str) else [value]
        right_length = self.length is None or len(numbers) == self.length
        if value is not None and not (right_length and all(self.holds(number) for number in numbers)):
            too_low = not isinstance(value, list | tuple) and self.above == 0 and value <= 0
            raise ValueError(f"{key}={value} must be {'positive' if too_low else self}")


def _end(limit: float | None) -> str:
    return "" if limit is None else str(limit) if isinstance(limit, int) else f"{limit:g}"


_NUMBERS = {2: "two"}


def ranged(
    default: Any = MISSING,
    *,
    default_factory: Callable[[], Any] | Any = MISSING,
    metadata: dict[str, Any] | None = None,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    length: int | None = None,
) -> Any:
    """Return a dataclass field whose values have limits.

    Args:
        default: That of `dataclasses.field`, like `default_factory` and `metadata`.
        default_factory: That of `dataclasses.field`.
        metadata: That of `dataclasses.field`.
        above: That of `Range`, like those that follow.
        at_least: That of `Range`.
        at_most: That of `Range`.
        below: That of `Range`.
        length: That of `Range`.
    """
    metadata = (metadata or {}) | {"range": Range(above, at_least, at_most, below, length)}
    return dataclasses.field(default=default, default_factory=default_factory, metadata=metadata)


def ranged_like(kind: type, name: str, default: Any) -> Any:
    """Return a dataclass field with the limits of a field of another dataclass, and a default of its own.

    Args:
        kind: The dataclass that declares them.
        name: Its field.
        default: That of `dataclasses.field`.
    """
    (limits,) = (field.metadata["range"] for field in dataclasses.fields(kind) if field.name == name)
    return dataclasses.field(default=default, metadata={"range": limits})


def check_ranges(section: Any, prefix: str = "") -> None:
    """Check that all values make sense and lie in their fields' ranges, in `section` and the dataclasses inside it.

    Args:
        section: An instance of a dataclass.
        prefix: What comes before the names of its fields in messages, such as `train.`.

    Raises:
        ValueError: A value makes no sense or is outside its range; the message names the first one.
    """
    hints = typing.get_type_hints(type(section))
    for field in dataclasses.fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        if value is None and field.name in hints and not is_optional(hints[field.name]):
            raise ValueError(f"{key}=null is no value; give one, or leave it out")
        check_sense(key, value, may_be_empty=field.metadata.get("may_be_empty", False))
        if limits := field.metadata.get("range"):
            limits.check(key, value)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{key}.")
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    check_ranges(item, f"{key}: {getattr(item, 'label', number)} ")


def ranges_of(kind: type, prefix: str = "") -> Iterator[tuple[str, Range]]:
    """Yield key, such as `train.steps`, and range of each ranged field of a dataclass and of those inside it."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key = f"{prefix}{field.name}"
        if limits := field.metadata.get("range"):
            yield key, limits
        if dataclasses.is_dataclass(hints[field.name]):
            yield from ranges_of(hints[field.name], f"{key}.")


def is_optional(hint: Any) -> bool:
    """Return whether a type has None among its values."""
    return hint in (None, type(None), Any) or any(is_optional(part) for part in _union_parts(hint))


def _union_parts(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
