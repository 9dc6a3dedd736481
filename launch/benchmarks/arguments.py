"""The command lines of the benchmarks: numbers that make sense, and mistakes in one line."""

from __future__ import annotations

import argparse
import math
import re
import sys
from typing import NoReturn

from data_pipeline.command_line.mistakes import one_line, suggestion

_MOST = 2**31


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, and what was probably meant, and exits with 2."""

    def __init__(self, **settings) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Print the mistake and exit."""
        unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
        near = suggestion(unknown[1], self._spellings()) if unknown else ""
        print(f"{self.prog}: {one_line(message)}{near}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)

    def _spellings(self) -> list[str]:
        inner = [
            parser
            for action in self._actions
            if isinstance(action, argparse._SubParsersAction)
            for parser in action.choices.values()
        ]
        return [spelling for parser in (self, *inner) for spelling in parser._option_string_actions]


def whole(text: str) -> int:
    """Read a whole number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 to {_MOST}")
    return number


def amount(text: str) -> float:
    """Read a number that is more than 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0, up to {_MOST}")
    return number
