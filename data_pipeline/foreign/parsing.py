"""JSON and YAML as plain values, within limits that are checked before anything grows.

YAML is read twice: first its events, of which none is kept, and which tell how deep and how large the values will be
with all aliases written out; then the values. In

    a: &a [x, x]
    b: [*a, *a]

`*a` counts for the three nodes of `[x, x]`, so that nine lines of this kind, which mean a billion nodes, are refused
at the fifth; and an alias inside of its own anchor, which never ends, is refused where it stands.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from data_pipeline.printable import printable

MOST_DEPTH = 64
"""Levels of lists and objects in each other."""
MOST_NODES = 1_000_000
"""Values, lists and objects of a YAML text together, with aliases written out."""
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}


def parse_json(text: str, origin: object) -> Any:
    """Return the values of a JSON text.

    Args:
        text: The text.
        origin: What messages call it, such as the path of the file.

    Raises:
        ValueError: It is not JSON, a key is there twice, or it is nested too deeply; one line that names `origin`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise _too_deep(origin) from None
    except ValueError as error:
        reason = str(error).partition(";")[0]  # Python would have the limit of digits raised
        raise ValueError(f"{printable(origin)}: is not readable JSON: {reason}; restore or correct it") from None
    level, depth = [value] if isinstance(value, dict | list) else [], 0
    while level:
        if (depth := depth + 1) > MOST_DEPTH:
            raise _too_deep(origin)
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
    return value


def parse_yaml(text: str, origin: object) -> Any:
    """Return the values of a YAML text, of which `5e-2` is a number and `2026-11-28` a text.

    Args:
        text: The text.
        origin: What messages call it, such as the path of the file.

    Raises:
        ValueError: As `check_yaml`.
    """
    import yaml

    check_yaml(text, origin)
    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise _not_yaml(origin, error) from None
    except ValueError as error:  # `!!int abc`, or 0x_
        raise ValueError(f"{printable(origin)} holds a number that is none: {printable(error)}; correct it") from None


def check_yaml(text: str, origin: object) -> None:
    """Check that a YAML text can be read within the limits, without making its values.

    Args:
        text: The text.
        origin: What messages call it, such as the path of the file.

    Raises:
        ValueError: It is not YAML, a key is there twice, a tag asks for an object, or it is nested too deeply or too
            large with its aliases written out; one line that names `origin`, and the line where there is one.
    """
    import yaml

    try:
        _Limits(origin).check(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except yaml.YAMLError as error:
        raise _not_yaml(origin, error) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {printable(twice)!r} is there twice")
    return values


def _too_deep(origin: object) -> ValueError:
    return ValueError(f"{printable(origin)}: is nested more than {MOST_DEPTH} levels deep; no file of this kind is")


def _not_yaml(origin: object, error: Exception) -> ValueError:
    reason = printable(" ".join(str(error).replace(' in "<unicode string>",', ",").split()))
    return ValueError(f"{printable(origin)}: is not readable YAML: {reason}; correct it")


@dataclass
class _Open:
    """A list or an object whose end has not come yet, and what is known of it so far."""

    anchor: str | None
    is_object: bool
    nodes: int = 1
    """The nodes in it and itself."""
    height: int = 1
    """Levels in it, its own included."""
    keys: set[str] = field(default_factory=set)
    at_key: bool = True


class _Limits:
    """A count of the nodes that the events of a YAML text stand for."""

    def __init__(self, origin: object) -> None:
        self.origin, self.line = origin, 1
        self.open: list[_Open] = []
        self.closed: dict[str, tuple[int, int]] = {}
        """Nodes and levels of what has an anchor."""

    def check(self, events: Iterable[Any]) -> None:
        """Go through all events."""
        import yaml

        for event in events:
            self.line = event.start_mark.line + 1
            if getattr(event, "tag", None) not in _TAGS | {None, "!"}:
                raise self._refusal(f"tag {event.tag!r} is not known", "leave it out")
            if isinstance(event, yaml.ScalarEvent):
                self._add(1, 0, event.anchor, event.value)
            elif isinstance(event, yaml.AliasEvent):
                self._add_alias(str(event.anchor))
            elif isinstance(event, yaml.CollectionStartEvent):
                self.open.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
                if len(self.open) > MOST_DEPTH:
                    raise _too_deep(self.origin)
            elif isinstance(event, yaml.CollectionEndEvent):
                ended = self.open.pop()
                self._add(ended.nodes, ended.height, ended.anchor)

    def _add_alias(self, anchor: str) -> None:
        if any(anchor == container.anchor for container in self.open):
            raise self._refusal(f"alias *{anchor} stands inside of its own anchor, which has no end", "write it out")
        if anchor in self.closed:  # else it is a mistake that the second reading finds
            self._add(*self.closed[anchor], None, "*" + anchor)

    def _add(self, nodes: int, height: int, anchor: str | None, text: str | None = None) -> None:
        """Count a complete node for the list or object around it.

        Args:
            nodes: The nodes that it stands for.
            height: Its levels.
            anchor: Its anchor.
            text: The text of a scalar.
        """
        if anchor is not None:
            self.closed[anchor] = nodes, height
        if not self.open:
            return
        around = self.open[-1]
        around.nodes, around.height = around.nodes + nodes, max(around.height, height + 1)
        if around.nodes > MOST_NODES:
            raise self._refusal(f"more than {MOST_NODES:,} values, with aliases written out", "use fewer aliases")
        if len(self.open) + height > MOST_DEPTH:
            raise _too_deep(self.origin)
        if around.is_object:
            if around.at_key:
                self._add_key(around, text)
            around.at_key = not around.at_key

    def _add_key(self, around: _Open, text: str | None) -> None:
        if text is None:
            raise self._refusal("a list or object is no key", "use a word")
        if text in around.keys:
            raise self._refusal(f"key {text!r} is there twice", "leave one of them out")
        around.keys.add(text)

    def _refusal(self, what: str, remedy: str) -> ValueError:
        return ValueError(f"{printable(self.origin)}, line {self.line}: {printable(what)}; {remedy}")


@functools.cache
def _loader() -> Any:
    """Return PyYAML's safe loader with the numbers of YAML 1.2, and without dates."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """The loader of this project."""

        yaml_implicit_resolvers: ClassVar = {
            letter: [(tag, pattern) for tag, pattern in found if not tag.endswith((":timestamp", ":float"))]
            for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    number = r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{number})$"), list("-+0123456789."))
    return Loader
