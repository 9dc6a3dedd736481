"""The files that a command line names with `--config`, and those that these name, before jsonargparse reads them."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.command_line.mistakes import naming
from data_pipeline.foreign import check_yaml, parse_yaml, read_text

MOST_SECTIONS = 4096
"""The longest list whose entries are sections, such as `data.sources`."""


def copy_long_lists_once() -> None:
    """Make jsonargparse (4.53) read lists in linear time.

    For each item it copies deeply what it knows of the option, and with it the whole list, twice, at which it only
    looks. A list of 200,000 items would take days.
    """
    import jsonargparse._typehints as typehints

    def copied(value: Any) -> Any:
        if isinstance(value, dict) and value.keys() >= {"prev_val", "orig_val", "sub_add_kwargs"}:
            return value | {"sub_add_kwargs": value["sub_add_kwargs"].copy()}
        return copy.deepcopy(value)

    if getattr(typehints, "deepcopy", None) is copy.deepcopy:
        typehints.deepcopy = copied  # type: ignore[assignment]


def check_lists(value: Any, origin: str = "") -> None:
    """Refuse lists of so many sections that making settings of them would take minutes."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, list) and len(item) > MOST_SECTIONS and isinstance(item[-1], dict):
            raise ValueError(
                f"{origin}a list has {len(item):,} entries with settings of their own; use {MOST_SECTIONS} at most"
            )
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        left += [part for part in inner if isinstance(part, list | dict)]


def config_files(argv: list[str]) -> list[str]:
    """Return the files that a command line names with `--config`."""
    return [value for name, value in _pairs(argv) if name == "--config"]


def check_files(argv: list[str], sections: Collection[str] = ()) -> None:
    """Check the files that a command line names as settings: they are regular files of YAML within its limits.

    Args:
        argv: The command line without the program.
        sections: The keys whose value are settings of their own, or a file of them: `--model FILE`, or `model: FILE` in
            a file of `--config`, seen from that.

    Raises:
        ValueError: One is not, or gives a section something else, which jsonargparse would take for no settings at all;
            one line that names it.
    """
    for name, value in _pairs(argv):
        if name == "--config":
            if not _is_there(value) and Path(value).suffix in (".yaml", ".yml", ".json"):
                raise ValueError(f"--config {value}: there is no such file")
            values = _settings(value)
            check_lists(values, f"{value}: ")
            for section in sections if isinstance(values, dict) else ():
                if section in values and not isinstance(values[section], dict | str):
                    raise ValueError(
                        f"{value}: {section}={values[section]} is no section; give it as `{section}:` with its "
                        "settings below, or leave it out"
                    )
                _check_section_file(section, values.get(section), Path(value).parent)
        elif name.removeprefix("--") in sections and name.startswith("--"):
            _check_section_file(name.removeprefix("--"), value, Path())


def _settings(given: str) -> Any:
    """Return what a file holds, or settings that are given in its place; None for what jsonargparse refuses."""
    if _is_there(given):
        return parse_yaml(read_text(given), given)
    try:
        return parse_yaml(given, given)
    except ValueError:
        return None


def _pairs(argv: list[str]) -> Iterator[tuple[str, str]]:
    return itertools.pairwise(word for argument in argv for word in argument.split("=", 1))


def _check_section_file(section: str, value: Any, folder: Path) -> None:
    if isinstance(value, str) and value and _is_there(folder / value):
        path = folder / value
        with naming(f"{section}={value}"):
            check_yaml(read_text(path), path)


def _is_there(path: str | Path) -> bool:
    """Return whether there is something of this name; if not, it is a text of settings, or jsonargparse says that."""
    return len(str(path)) < 4096 and "\0" not in str(path) and os.path.lexists(path)
