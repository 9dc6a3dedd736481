"""The files that a command line names with `--config`, and those that these name, before jsonargparse reads them."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from data_pipeline.foreign import check_yaml, parse_yaml, read_text

MODE = "strict yaml"
"""The name under which jsonargparse knows `load_yaml`."""
MOST_SECTIONS = 4096
"""The longest list whose entries are sections, such as `data.sources`."""


def use_strict_yaml() -> None:
    """Make `load_yaml` known to jsonargparse."""
    import jsonargparse
    import yaml

    copy_long_lists_once()
    jsonargparse.set_loader(MODE, load_yaml, exceptions=(yaml.YAMLError, ValueError))


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


def load_yaml(text: str) -> Any:
    """Return the values of YAML as jsonargparse reads it, within the limits of `check_yaml`."""
    import jsonargparse

    check_yaml(text, "the text")
    value = jsonargparse.get_loader("yaml")(text)
    _check_lists(value)
    return value


def _check_lists(value: Any, origin: str = "") -> None:
    """Refuse lists of so many sections that making settings of them would take minutes."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, list) and len(item) > MOST_SECTIONS and isinstance(item[-1], dict):
            raise ValueError(
                f"a list has {len(item):,} entries with settings of their own; use {MOST_SECTIONS} at most"
            )
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        left += [part for part in inner if isinstance(part, list | dict)]


def check_files(argv: list[str], sections: Collection[str] = ()) -> None:
    """Check the files that a command line names as settings: they are regular files of YAML within its limits.

    Args:
        argv: The command line without the program.
        sections: The keys whose value may be a file as well: `--model FILE`, or `model: FILE` in a file of `--config`,
            seen from that.

    Raises:
        ValueError: One is not; one line that names it.
    """
    words = [word for argument in argv for word in argument.split("=", 1)]
    for name, value in itertools.pairwise(words):
        if name == "--config" and _is_there(value):
            values = parse_yaml(read_text(value), value)
            _check_lists(values, f"{value}: ")
            for section in sections if isinstance(values, dict) else ():
                _check_section(values.get(section), Path(value).parent)
        elif name.removeprefix("--") in sections and name.startswith("--"):
            _check_section(value, Path())


def _check_section(value: Any, folder: Path) -> None:
    if isinstance(value, str) and _is_there(folder / value):
        path = folder / value
        check_yaml(read_text(path), path)


def _is_there(path: str | Path) -> bool:
    """Return whether there is something of this name; if not, it is a text of settings, or jsonargparse says that."""
    return len(str(path)) < 4096 and "\0" not in str(path) and os.path.lexists(path)
