"""Wrong command lines of every command, made from the types of its options: what a person or a script might give."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any

from data_pipeline.command_line.options import options_of
from data_pipeline.command_line.ranges import Range
from gptoss_dist.config import Config

NUMBERS = ["x", "", "nan", ".nan", ".inf", "-.inf", "inf", "1e400", "-1e400", "true", "[1]", "{a: 1}", "1,5", "0x"]
WRONG: dict[Any, list[str]] = {
    int: [*NUMBERS, "1.5", "5e-2", str(2**64), "-" + "9" * 30, "9" * 5000],
    float: [*NUMBERS, "--", "1e", "e5"],
    bool: ["2", "maybe", "", "null", "[true]"],
    str: [""],
    list: ["5", "[1", "{a: 1}"],
    tuple: ["5", "x", "{a: 1}", "[1]"],
    dict: ["5", "[1]", "x"],
}
SECTION = ["5", "null", "[1]", "", "true", "1.5", "nowhere.yaml", "{stepz: 1}"]


def wrong_values(kind: Any, limits: Range | None) -> Iterator[str]:
    """Values that an option of a type and a range cannot have, as they are typed."""
    parts = [part for part in _parts(kind) if part is not type(None)]
    optional = type(None) in _parts(kind)
    if any(part is Any for part in parts):
        return
    choices = [
        choice for part in parts if typing.get_origin(part) is typing.Literal for choice in typing.get_args(part)
    ]
    if choices:
        yield from ["x", "", str(choices[0]).upper() + "?", "[1]", "{a: 1}", *([] if optional else ["null"])]
    if limits is not None:
        yield from _outside(limits)
    plain = [typing.get_origin(part) or part for part in parts]
    if str in plain:
        yield ""
        return
    if len(plain) == 1 and not choices:
        yield from WRONG.get(plain[0], SECTION)
        if plain[0] in (int, float) and not optional:
            yield "null"
    items = [item for part in parts for item in typing.get_args(part)]
    if float in items:
        brackets = "{{a: {}}}" if dict in plain else "[0.5, {}]"
        yield from (brackets.format(number) for number in (".inf", ".nan", "1e400", "x", "[1]"))


def _parts(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _outside(limits: Range) -> Iterator[str]:
    for number, step in ((limits.above, 0), (limits.at_least, -1), (limits.at_most, 1), (limits.below, 0)):
        if number is not None:
            value = number + step
            yield f"[{value}, {value}]" if limits.length else str(value)


def of_command(kind: type) -> Iterator[tuple[str, list[str]]]:
    """Key and words of wrong command lines of a command whose options are a dataclass."""
    ranges = {field.name: field.metadata.get("range") for field in dataclasses.fields(kind)}
    for option in options_of(kind):
        if option.positional:
            continue
        for value in wrong_values(option.kind, ranges[option.name]):
            if not option.is_list:
                yield option.name, [f"{option.spelling}={value}"]
        if option.is_list:
            yield option.name, [f"{option.spelling}="] if option.metavar != "PROMPT" else [option.spelling]
        if not option.is_flag:
            yield option.spelling, [option.spelling]
        misspelt = option.spelling[:-2] + option.spelling[-1] + option.spelling[-2]
        yield option.spelling, [misspelt] if option.is_flag else [misspelt, "1"]


def of_training(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Key and words of wrong command lines of train.py."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key, hint = prefix + field.name, hints[field.name]
        for value in wrong_values(hint, field.metadata.get("range")):
            yield key, [f"--{key}={value}"]
        if dataclasses.is_dataclass(hint):
            yield from of_training(typing.cast(type, hint), f"{key}.")
        else:
            yield f"--{key}", [f"--{key}"]
            misspelt = key[:-2] + key[-1] + key[-2]
            if misspelt != key:
                yield f"--{key}", [f"--{misspelt}=1"]
