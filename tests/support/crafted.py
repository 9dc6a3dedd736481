"""Files as somebody might craft them: every value of a JSON file replaced by what it cannot be."""

import copy
import json
from collections.abc import Iterator
from typing import Any

DEEP = "DEEP"
"""A value in whose place `text` writes a list that is nested 100,000 times."""
WRONG: dict[str, Any] = {
    "gone": None,
    "null": None,
    "text": "two\x1b[31m",
    "negative": -1,
    "huge": 10**30,
    "large": 10**8,
    "fraction": 0.5,
    "infinite": float("inf"),
    "not a number": float("nan"),
    "flag": True,
    "list": [["x"]],
    "object": {"x": {}},
    "deep": DEEP,
}


def keys(values: Any, most: int = 3) -> Iterator[tuple]:
    """Yield the path of each value, down to `most` levels; of a list only the first."""
    items = (
        values.items() if isinstance(values, dict) else list(enumerate(values))[:1] if isinstance(values, list) else ()
    )
    for key, inner in items:
        yield (key,)
        if most > 1:
            yield from ((key, *rest) for rest in keys(inner, most - 1))


def changed(values: Any, path: tuple, kind: str) -> Any:
    """Return a copy in which the value at `path` is of a wrong kind."""
    values = copy.deepcopy(values)
    around = values
    for key in path[:-1]:
        around = around[key]
    if kind == "gone":
        del around[path[-1]]
    else:
        around[path[-1]] = WRONG[kind]
    return values


def text(values: Any) -> str:
    """Return the values as JSON."""
    return json.dumps(values).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)


def is_one_line(message: str, *names: str) -> bool:
    """Return whether a message is one line that a person can read, and has one of the names in it."""
    return (
        "\n" not in message
        and "\x1b" not in message
        and "Traceback" not in message
        and len(message) < 2000
        and any(name in message for name in names)
    )
