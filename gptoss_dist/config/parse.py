"""Settings from YAML files and the command line."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.command_line import new_parser, parse_with, show_ranges
from data_pipeline.foreign import parse_yaml, read_text
from gptoss_dist.config.tree import Config
from gptoss_dist.model.config import ModelConfig

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


@functools.cache
def _parser_of_settings() -> jsonargparse.ArgumentParser:
    """Return a parser without further options; to make one takes longer than to parse with it."""
    return build_parser()


def check_named(argv: list[str]) -> None:
    """Raise ValueError if a command line names neither settings nor a model, whose defaults are gpt-oss-20b."""
    if not any(argument.startswith(("--config", "--model")) for argument in argv):
        raise ValueError(
            "no run is named, and the model's defaults are gpt-oss-20b; give --config FILE, such as "
            "configs/quickstart.yaml, or --model FILE"
        )


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
    argv = _with_one_kind_of_data(_with_whole_models(argv))
    values = parse_with(parser or _parser_of_settings(), argv, sections)
    names = {field.name for field in dataclasses.fields(Config)}
    config = Config(**{name: values[name] for name in names})
    return config, {name: value for name, value in values.items() if name not in names | {"config"}}


def _with_whole_models(argv: list[str]) -> list[str]:
    """Return a command line in which the file of a model replaces a model that was named before.

    jsonargparse would keep those fields of the former that the latter's file leaves at their defaults, and make a
    mixture of both. So all fields are given of a model that `--model FILE` or a further `--config FILE` names.
    """
    result, is_second, words = [], False, iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        result.append(word)
        if name in ("--config", "--model"):
            if not equals:
                result.append(value := next(words, ""))
            if is_second and (fields := _fields(_model_of(value) if name == "--config" else value)):
                result.append(f"--model={json.dumps(fields)}")
        is_second |= name == "--config" or name.partition(".")[0] == "--model"
    return result


def _with_one_kind_of_data(argv: list[str]) -> list[str]:
    """Return a command line in which `--data.path FOLDER` replaces the sources of the files before it.

    Both say what is read, so that the later one wins, as with any option. Given side by side they are refused.
    """
    result, words = [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        result.append(word)
        if name == "--data.path":
            if not equals:
                result.append(value := next(words, ""))
            if value not in ("", "null") and not any(w.partition("=")[0] == "--data.sources" for w in argv):
                result.append("--data.sources=[]")
    return result


def _model_of(file: str) -> str | None:
    """Return the path of the file that a file of settings names as its model, if it does."""
    try:
        model = parse_yaml(read_text(file), file)["model"]
    except (ValueError, KeyError, TypeError):  # which the parser will say
        return None
    return str(Path(file).parent / model) if isinstance(model, str) else None


def _fields(file: str | None) -> dict[str, Any] | None:
    """Return all fields of the model in a file; None where it is none, or needs further options to be one."""
    try:
        return ModelConfig.from_yaml(file).to_dict() if file and Path(file).is_file() else None
    except (ValueError, OSError):
        return None


def load_config(*paths: str | Path, overrides: dict[str, object] | None = None) -> Config:
    """Read YAML files, later ones winning, then apply `{"section.field": value}`.

    Raises:
        ValueError: As `parse_arguments`.
    """
    argv = [part for path in paths for part in ("--config", str(path))]
    argv += [f"--{key}={'null' if value is None else value}" for key, value in (overrides or {}).items()]
    return parse_arguments(argv)[0]
