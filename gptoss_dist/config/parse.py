"""Settings from YAML files and the command line."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from gptoss_dist.config.tree import Config


def build_parser(**kwargs):
    """A jsonargparse parser with `--config` and one option per field; later values win."""
    import jsonargparse

    # Help texts come from the strings below the fields.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # The generated usage would list each of a hundred options before the first help text.
    usage = "%(prog)s [--config FILE]... [--section.field VALUE]... [further options below]"
    parser = jsonargparse.ArgumentParser(exit_on_error=False, usage=usage, **kwargs)
    parser.add_argument("--config", action="config", help="YAML file of settings; may be given several times")
    parser.add_class_arguments(Config, sub_configs=True)
    return parser


def parse_arguments(argv: list[str], parser=None) -> tuple[Config, dict]:
    """Settings from `--config` files and `--section.field value` options, and what `parser` adds to them.

    Raises:
        ValueError: an unknown key, a wrong type or an impossible value; one line that names it.
    """
    import jsonargparse

    parser = parser or build_parser()
    names = {f.name for f in dataclasses.fields(Config)}
    try:
        values = vars(parser.instantiate(parser.parse_args(argv)))
    except (jsonargparse.ArgumentError, argparse.ArgumentError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    return Config(**{k: values[k] for k in names}), {k: v for k, v in values.items() if k not in names | {"config"}}


def load_config(*paths: str | Path, overrides: dict[str, object] | None = None) -> Config:
    """Read YAML files, later ones winning, then apply `{"section.field": value}`.

    Raises:
        ValueError: as `parse_arguments`.
    """
    argv = [part for path in paths for part in ("--config", str(path))]
    argv += [f"--{key}={'null' if value is None else value}" for key, value in (overrides or {}).items()]
    return parse_arguments(argv)[0]
