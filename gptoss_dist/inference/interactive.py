"""A loop that reads prompts from a person and writes how the model goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from data_pipeline.command_line.mistakes import in_words, is_explained
from data_pipeline.printable import printable

if TYPE_CHECKING:
    from gptoss_dist.inference.session import Session

REPL_SETTINGS = {
    ":t": ("temperature", float, "0.8"),
    ":k": ("top_k", int, "50"),
    ":p": ("top_p", float, "0.95"),
    ":m": ("min_p", float, "0.05"),
    ":r": ("repetition_penalty", float, "1.2"),
    ":n": ("max_new_tokens", int, "128"),
}
"""Name, type and an example of what each command sets."""
_MOST_CHARACTERS = 40
"""How much of a wrong value a message shows."""


def repl(session: Session, settings: dict[str, Any], check: Callable[[dict[str, Any]], None], help: str) -> int:
    """Read lines from standard input until its end or `:q`, and return the exit code 0.

    Ctrl-C ends the text that is being written, and at a prompt the loop.

    Args:
        session: What writes the text.
        settings: Those of `Session.write`, which commands such as `:t 0.5` change.
        check: Raises ValueError if settings make no sense; those from before then stay.
        help: What is printed at the beginning, and for an unknown command.
    """
    print(help)
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
                name, changed = _changed(settings, command, value.strip())
                check(changed)
                settings = changed
                print(f"{name} = {settings[name]}")
            elif command.startswith(":"):
                print(help)
            elif line:
                print(line, end="", flush=True)
                try:
                    session.write(line, on_text=_print, **settings)
                finally:
                    print()  # what is wrong then stands on a line of its own
        except KeyboardInterrupt:
            print("interrupted; :q quits")
        except Exception as error:
            # Errors of the system are not the person's: nobody may be there to read what is printed.
            if isinstance(error, OSError) or not is_explained(error):
                raise
            print(f"could not: {in_words(error)}")


def _changed(settings: dict[str, Any], command: str, value: str) -> tuple[str, dict[str, Any]]:
    """Return the name of the setting that a command changes, and all settings with it.

    Raises:
        ValueError: The value is not of the setting's type; the message has the setting, the value and an example.
    """
    name, kind, example = REPL_SETTINGS[command]
    try:
        return name, settings | {name: kind(value)}
    except ValueError:
        shown = repr(value if len(value) <= _MOST_CHARACTERS else f"{value[:_MOST_CHARACTERS]}...")
        wrong = f"={shown} must be {'a whole number' if kind is int else 'a number'}" if value else " is given no value"
        raise ValueError(f"{name}{wrong}; type for example {command} {example}") from None


def _print(text: str) -> None:
    print(printable(text, lines=True), end="", flush=True)
