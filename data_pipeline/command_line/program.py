"""How commands begin and end: read the command line, do the work, report what went wrong in one line, exit code."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, TextIO, TypeVar

from data_pipeline.command_line.mistakes import in_words, is_explained, lacks_subject, one_line, suggestion
from data_pipeline.command_line.parser import parse
from data_pipeline.command_line.process import accept_any_text
from data_pipeline.printable import printable
from data_pipeline.secrets import without_secrets

T = TypeVar("T")

MISTAKE = 2
"""Exit code where the command line, or a file that it names with `--config`, asks for something impossible."""


@dataclass(frozen=True)
class Program:
    """What a command calls itself, and how it ends."""

    name: str
    """What a person types, such as `python -m data_pipeline.prepare`."""
    prefix: str = "error"
    """What comes before the message where something went wrong."""
    failed: int = 1
    """Exit code where the work could not be done."""
    interrupted: str = "interrupted"
    """What is printed after Ctrl-C."""
    epilog: str | None = None
    """The last paragraph of its help."""

    def report(self, message: object) -> None:
        """Print what went wrong, in one line."""
        print_line(f"{self.prefix}: {one_line(without_secrets(str(message)))}", file=sys.stderr)


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print a text for people, at once; what a terminal would obey, or its encoding lacks, is printed as escapes."""
    stream = file or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(printable(text, lines=True).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def run(program: Program, kind: type[T], action: Callable[[T], int | None], argv: list[str] | None = None) -> int:
    """Call `action` with what the command line says, and return the exit code.

    Args:
        program: What it calls itself, and how it ends.
        kind: The dataclass of its options.
        action: Does the work; raises ValueError with a line for a person, or what `in_words` makes one of. It returns
            the exit code, or None for 0.
        argv: The command line without the program; by default that of this process.
    """
    accept_any_text(restart=argv is None)
    try:
        settings = parse(kind, sys.argv[1:] if argv is None else argv, prog=program.name, epilog=program.epilog)
    except Exception as error:
        if not is_explained(error):
            raise
        program.report(in_words(error))
        return MISTAKE
    try:
        code = action(settings)
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head`: not an error, but Python would complain again on its way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(program.interrupted, file=sys.stderr)
        return 130
    except Exception as error:
        if not is_explained(error):
            raise
        program.report(_with_subject(in_words(error), error, settings))
        return program.failed
    return code or 0


def _with_subject(words: str, error: Exception, settings: Any) -> str:
    """Return the words of an error that does not know its file, after what the command was given."""
    if not lacks_subject(error):
        return words
    required = [field.name for field in dataclasses.fields(settings) if field.default is MISSING]
    given = [f"{name}={value}" for name in required if (value := getattr(settings, name))]
    return f"{', '.join(given)}: {words}" if given else words


def run_verb(
    program: Program,
    verbs: Mapping[str, tuple[type, Callable[[Any], int | None]]],
    argv: list[str] | None = None,
    *,
    description: str,
) -> int:
    """Do as `run` with the options and the function of the verb that is the first word of the command line.

    Args:
        program: What it calls itself without the verb.
        verbs: The dataclass of the options, and what does the work, by verb.
        argv: That of `run`.
        description: What `--help` prints above the list of verbs.
    """
    accept_any_text(restart=argv is None)
    verb, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if verb in ("-h", "--help"):
        width = max(map(len, verbs)) + 2
        listed = [f"  {n:<{width}}{(kind.__doc__ or '').strip().splitlines()[0]}" for n, (kind, _) in verbs.items()]
        print(
            f"usage: {program.name} VERB ...", description.strip(), "verbs (VERB --help lists its options):", sep="\n\n"
        )
        print(*listed, sep="\n")
        return 0
    if verb not in verbs:
        program.report(f"{verb!r} is no verb; give one of {', '.join(verbs)}{suggestion(verb, verbs)}")
        return MISTAKE
    kind, action = verbs[verb]
    return run(dataclasses.replace(program, name=f"{program.name} {verb}"), kind, action, rest)
