"""Settings from YAML files and the command line."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.command_line import new_parser, parse_with, show_ranges
from gptoss_dist.config.tree import Config

if TYPE_CHECKING:
    import jsonargparse


def build_parser(**arguments: Any) -> jsonargparse.ArgumentParser:
    """Return a parser with `--config` and one option for each field; later values win.

    Args:
        **arguments: Further ones of `jsonargparse.ArgumentParser`.
    """
    # The generated usage would list each of a hundred options before the first help text.
    usage = "%(prog)s [--config FILE]... [--section.field VALUE]... [further options below]"
    parser = new_parser(usage=usage, **arguments)
    parser.add_class_arguments(Config, sub_configs=True)
    show_ranges(parser, Config)
    return parser


def parse_arguments(argv: list[str], parser: jsonargparse.ArgumentParser | None = None) -> tuple[Config, dict]:
    """Return the settings that `--config` files and `--section.field value` options give, and what `parser` adds.

    Args:
        argv: The command line without the program.
        parser: One of `build_parser`, perhaps with further options.

    Raises:
        ValueError: An unknown key, a wrong type or an impossible value; one line that names it.
    """
    for argument in argv:
        if (name := argument.partition("=")[0]) in ("--deepspeed", "--deepspeed_config", "--deepspeed-config"):
            raise ValueError(
                f"{name} is the option of other programs for a JSON file of DeepSpeed's settings; here it is "
                "--engine.deepspeed FILE"
            )
    kinds = typing.get_type_hints(Config)
    sections = [name for name, kind in kinds.items() if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind)]
    values = parse_with(parser or build_parser(), argv, sections)
    names = {field.name for field in dataclasses.fields(Config)}
    config = Config(**{name: values[name] for name in names})
    return config, {name: value for name, value in values.items() if name not in names | {"config"}}


def load_config(*paths: str | Path, overrides: dict[str, object] | None = None) -> Config:
    """Read YAML files, later ones winning, then apply `{"section.field": value}`.

    Raises:
        ValueError: As `parse_arguments`.
    """
    argv = [part for path in paths for part in ("--config", str(path))]
    argv += [f"--{key}={'null' if value is None else value}" for key, value in (overrides or {}).items()]
    return parse_arguments(argv)[0]
