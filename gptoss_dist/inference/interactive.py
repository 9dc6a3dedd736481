"""A loop that reads prompts from a person and writes how the model goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from data_pipeline.printable import printable

if TYPE_CHECKING:
    from gptoss_dist.inference.session import Session

REPL_HELP = (
    ":t TEMPERATURE   :k TOP_K   :p TOP_P   :m MIN_P   :r REPETITION_PENALTY   :n NEW_TOKENS   :q quit; "
    "anything else is a prompt"
)
REPL_SETTINGS = {
    ":t": ("temperature", float),
    ":k": ("top_k", int),
    ":p": ("top_p", float),
    ":m": ("min_p", float),
    ":r": ("repetition_penalty", float),
    ":n": ("max_new_tokens", int),
}


def repl(session: Session, settings: dict[str, Any], check: Callable[[dict[str, Any]], None]) -> int:
    """Read lines from standard input until its end or `:q`, and return the exit code 0.

    Args:
        session: What writes the text.
        settings: Those of `Session.write`, which commands such as `:t 0.5` change.
        check: Raises ValueError if settings make no sense; those from before then stay.
    """
    print(REPL_HELP)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        command, _, value = line.partition(" ")
        if command == ":q":
            return 0
        try:
            if command in REPL_SETTINGS:
                name, kind = REPL_SETTINGS[command]
                changed = settings | {name: kind(value)}
                check(changed)
                settings = changed
                print(f"{name} = {settings[name]}")
            elif command.startswith(":"):
                print(REPL_HELP)
            elif line:
                print(line, end="", flush=True)
                session.write(line, on_text=_print, **settings)
                print()
        except ValueError as error:
            print(f"could not: {error}")


def _print(text: str) -> None:
    print(printable(text, lines=True), end="", flush=True)
