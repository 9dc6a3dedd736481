"""docker/compose.yaml as Compose reads it, by YAML and the part of its interpolation that the file uses."""

import re
from collections.abc import Mapping

import yaml

from tests.support.ranks import ROOT

FILE = ROOT / "docker/compose.yaml"


def services(**variables: str) -> dict[str, dict]:
    """Return the services, with variables filled in.

    Raises:
        ValueError: A variable that the file demands is not given.
    """
    return _filled(yaml.safe_load(FILE.read_text()), variables)["services"]


def _filled(value: object, variables: Mapping[str, str]):
    match value:
        case dict():
            return {key: _filled(item, variables) for key, item in value.items()}
        case list():
            return [_filled(item, variables) for item in value]
        case str():
            return re.sub(r"\$\{(\w+):([-?])([^}]*)\}", lambda match: _value(*match.groups(), variables), value)
    return value


def _value(name: str, kind: str, text: str, variables: Mapping[str, str]) -> str:
    if variables.get(name):
        return variables[name]
    if kind == "?":
        raise ValueError(f"required variable {name} is missing a value: {text}")
    return text
