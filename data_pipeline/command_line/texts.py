"""YAML as commands write and read it, so that every text which is written is read as the same text.

PyYAML writes the text `1e5` without quotation marks, since it follows YAML 1.1, where that is no number; jsonargparse
reads it as one, as people mean it. And a text that YAML takes for nothing, such as `# x`, is a text on a command line.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from data_pipeline.command_line.files import check_lists
from data_pipeline.foreign import check_yaml

_NUMBER_WITHOUT_POINT = re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")


class _Dumper(yaml.SafeDumper):
    """A dumper that puts quotation marks around whatever jsonargparse would read as a number."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER_WITHOUT_POINT, list("-+0123456789"))


def dump_yaml(values: Any, *, allow_unicode: bool = True) -> str:
    """Return plain values as YAML, in the order of their keys."""
    return yaml.dump(values, Dumper=_Dumper, default_flow_style=False, allow_unicode=allow_unicode, sort_keys=False)


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text; one that YAML takes for nothing, but is not `null`, stays a text.

    Raises:
        ValueError: It is beyond the limits of `check_yaml` or `check_lists`.
    """
    import jsonargparse

    check_yaml(text, "the text")
    value = jsonargparse.get_loader("yaml")(text)
    check_lists(value)
    return text if value is None and text.strip() != "null" else value
