"""Options of a command as fields of a dataclass: how they are spelled, and how the help shows them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from typing import Any, cast

from data_pipeline.command_line.ranges import Range, ranged


def option(
    default: Any = MISSING,
    *,
    default_factory: Callable[[], Any] | Any = MISSING,
    spelling: str | None = None,
    metavar: str | None = None,
    several: bool = False,
    typed_only: bool = False,
    may_be_empty: bool = False,
    **limits: Any,
) -> Any:
    """Return a dataclass field that is spelled, shown or checked otherwise than its name says.

    Args:
        default: That of `dataclasses.field`, like `default_factory`. Without one the option must be given.
        default_factory: That of `dataclasses.field`.
        spelling: The option, such as `--from`; by default the field's name.
        metavar: What stands for the value in the help; by default the field's name.
        several: The field is a list that is given as `--train a b`, or as `--train a --train b`. Other lists are given
            only as `--filter a --filter b`, and are added to those of a file.
        typed_only: The field, a list, may be given on the command line only, not in a file that `--config` names.
        may_be_empty: Whether the text, or one of the list, may be empty.
        **limits: Those of `ranged`.
    """
    metadata = {
        "spelling": spelling,
        "metavar": metavar,
        "several": several,
        "typed_only": typed_only,
        "may_be_empty": may_be_empty,
    }
    if limits:
        return ranged(default, default_factory=default_factory, metadata=metadata, **limits)
    return dataclasses.field(default=default, default_factory=default_factory, metadata=metadata)


def positional(metavar: str, default: Any = MISSING, *, default_factory: Callable[[], Any] | Any = MISSING) -> Any:
    """Return a dataclass field for the words without an option's name: all of them if it is a list, else one.

    Args:
        metavar: What stands for such a word in the help.
        default: That of `dataclasses.field`, like `default_factory`. Without one there must be such a word.
        default_factory: That of `dataclasses.field`.
    """
    metadata = {"positional": True, "metavar": metavar, "several": True}
    return dataclasses.field(default=default, default_factory=default_factory, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """All that is known about the option of a field."""

    name: str
    """Name of the field, and key in files."""
    spelling: str
    """What is typed, such as `--validation-fraction`."""
    kind: Any
    """Type of the value, without strings in it."""
    required: bool
    default: Any
    text: str
    """The string below the field, with the range."""
    positional: bool = False
    several: bool = False
    metavar: str = ""
    typed_only: bool = False

    @property
    def is_flag(self) -> bool:
        """Whether it is given without a value."""
        return self.kind is bool

    @property
    def is_list(self) -> bool:
        """Whether it holds several texts."""
        return list in (typing.get_origin(self.kind), *map(typing.get_origin, typing.get_args(self.kind)))

    @property
    def value_shown(self) -> str:
        """What stands for the value in the help, such as `NAME [NAME ...]`."""
        choices = [
            str(choice)
            for part in (self.kind, *typing.get_args(self.kind))
            if typing.get_origin(part) is typing.Literal
            for choice in typing.get_args(part)
        ]
        word = "{" + ",".join(choices) + "}" if choices else self.metavar or self.name.upper()
        if not (self.is_list and self.several):
            return word
        return f"{word} [{word} ...]" if self.required else f"[{word} ...]"

    @property
    def shown(self) -> str:
        """How the help shows it, as a person types it."""
        if self.positional:
            return self.value_shown
        return f"{self.spelling}, --no-{self.spelling[2:]}" if self.is_flag else f"{self.spelling} {self.value_shown}"


def options_of(kind: type) -> list[Option]:
    """Return the options of a dataclass, in the order of its fields."""
    hints, texts, options = typing.get_type_hints(kind), _texts(kind), []
    for field in dataclasses.fields(kind):
        given, factory = field.default is not MISSING, field.default_factory
        required = not given and factory is MISSING
        default = None if required else field.default if given else cast(Callable[[], Any], factory)()
        options.append(
            Option(
                name=field.name,
                spelling=field.metadata.get("spelling") or "--" + field.name.replace("_", "-"),
                kind=hints[field.name],
                required=required,
                default=default,
                text=with_range(texts.get(field.name), field.metadata.get("range")),
                positional=field.metadata.get("positional", False),
                several=field.metadata.get("several", False),
                metavar=field.metadata.get("metavar") or "",
                typed_only=field.metadata.get("typed_only", False),
            )
        )
    return options


def _texts(kind: type) -> dict[str, str | None]:
    """Return the strings below the fields of a dataclass, and of those it is derived from, by field."""
    import docstring_parser

    kinds = [base for base in reversed(kind.__mro__) if dataclasses.is_dataclass(base)]
    found = [text for base in kinds for text in docstring_parser.parse_from_object(base).params]
    return {text.arg_name: text.description for text in found}


def with_range(text: str | None, limits: Range | None) -> str:
    """Return a help text in one line with its range: `Final share of the peak. (in [0, 1])`."""
    return " ".join([*(text or "").split(), *([f"({limits})"] if limits else [])])
