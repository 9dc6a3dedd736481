"""What no setting can be, whatever it is for: infinite, wider than 64 bits, or an empty text.

A field that means something by it says so: `option(..., may_be_empty=True)`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

LARGEST = 2**63 - 1
"""The largest whole number, as files and torch hold them."""
_MOST_DIGITS = 30


def check_sense(key: str, value: Any, *, may_be_empty: bool = False) -> None:
    """Check a value, and those of a list or dictionary; dataclasses inside are left to the one who knows their fields.

    Args:
        key: What messages call it.
        value: A plain value, or None, which is no value.
        may_be_empty: Whether texts may be.

    Raises:
        ValueError: It makes no sense; the message has `key`, the value and the remedy.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise ValueError(f"{key}: the name {name!r} must be a text; put it in quotation marks")
            check_sense(f"{key} of {name}", item, may_be_empty=True)
    elif isinstance(value, list | tuple):
        for item in value:
            check_sense(key, item, may_be_empty=may_be_empty)
    elif dataclasses.is_dataclass(value) or value is None or isinstance(value, bool):
        pass
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{key}={shown(value)} must be a whole number of at most 64 bits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key}={value} must be a finite number")
    elif isinstance(value, str) and not value and not may_be_empty:
        raise ValueError(f"{key} is empty ('{key}='): it must be given a text, or be left out")
    elif isinstance(value, str) and "\0" in value and not may_be_empty:
        raise ValueError(f"{key}={value!r} must not hold a zero byte")


def shown(value: Any) -> str:
    """Return a value as a message shows it: numbers of many digits by their size."""
    if isinstance(value, int) and abs(value) > 10**_MOST_DIGITS:
        return f"(a number of {value.bit_length()} bits)"
    return str(value)
