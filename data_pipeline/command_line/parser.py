"""Parsers: one for a dataclass of options, and what it has in common with that of a tree of sections."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, TypeVar

from data_pipeline.command_line.files import check_files, config_files, copy_long_lists_once
from data_pipeline.command_line.mistakes import one_line, suggestion
from data_pipeline.command_line.options import Option, options_of, with_range
from data_pipeline.command_line.ranges import check_ranges, ranges_of
from data_pipeline.command_line.spelling import known_spellings, spell_out, typed_values

if TYPE_CHECKING:
    import jsonargparse

T = TypeVar("T")

# jsonargparse is imported when a command line is read: not by every process that prepares data, nor for `Config(...)`.
_KEYS_LIKE_OPTIONS = "yaml with keys like options"
_TEXTS_STAY = "yaml whose texts stay"


def parse(kind: type[T], argv: list[str], *, prog: str, epilog: str | None = None) -> T:
    """Return the options that a command line, and the files which it names with `--config`, give.

    Args:
        kind: A dataclass whose fields are options, without sections.
        argv: The command line without the program.
        prog: What the program is called in its help.
        epilog: The last paragraph of the help.

    Raises:
        ValueError: An unknown key, a wrong type, a value outside its range, or one that is missing; one line that names
            key, value and remedy, and the file if it stands in one.
        SystemExit: After `--help` and `--print_config`, with code 0.
    """
    options = options_of(kind)
    spelled = spell_out(argv, options)
    try:
        values = parse_with(_parser_of(kind, options, prog, epilog), spelled)
        for option in options:
            if option.typed_only and values[option.name] != typed_values(spelled, option):
                raise ValueError(
                    f"{option.spelling}: may stand on the command line only, not in a file that --config names"
                )
    except ValueError as error:
        raise ValueError(f"{_as_typed(str(error), options)}; see {prog} --help") from None
    given = {option.name: values[option.name] for option in options}
    unchecked = object.__new__(kind)
    vars(unchecked).update(given)
    check_ranges(unchecked)  # each value for itself comes before what the class checks of several
    return kind(**given)


def new_parser(**arguments: Any) -> jsonargparse.ArgumentParser:
    """Return a parser that has `--config` and `--print_config`, and raises instead of exiting.

    Args:
        **arguments: Further ones of `jsonargparse.ArgumentParser`.
    """
    import jsonargparse
    import yaml

    from data_pipeline.command_line.texts import dump_yaml, load_yaml

    jsonargparse.set_dumper("yaml", dump_yaml)
    copy_long_lists_once()
    jsonargparse.set_loader(_TEXTS_STAY, load_yaml, exceptions=(yaml.YAMLError, ValueError))
    arguments.setdefault("allow_abbrev", False)
    arguments.setdefault("parser_mode", _TEXTS_STAY)
    # Help texts come from the strings below the fields.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(exit_on_error=False, **arguments)
    parser.add_argument("--config", action="config", help="YAML file of settings; may be given several times")
    return parser


def _as_typed(message: str, options: list[Option]) -> str:
    """Return a message of jsonargparse with the arguments that are missing as a person types them."""
    head, sign, names = message.partition("arguments are required: ")
    shown = {option.name: option.shown for option in options}
    return head + sign + ", ".join(shown.get(name, name) for name in names.split(", "))


def show_ranges(parser: jsonargparse.ArgumentParser, kind: type) -> None:
    """Add the ranges of a dataclass's fields, and of those of the dataclasses in it, to the help of their options."""
    ranges = dict(ranges_of(kind))
    for action in parser._actions:  # argparse has no public list of them
        if action.dest in ranges:
            action.help = with_range(action.help, ranges[action.dest])


def parse_with(parser: jsonargparse.ArgumentParser, argv: list[str], sections: Collection[str] = ()) -> dict[str, Any]:
    """Return the values that a parser made by `new_parser` reads, by key; those of a section are its dataclass.

    Args:
        parser: The parser.
        argv: The command line without the program.
        sections: The keys whose values are dictionaries of further ones.

    Raises:
        ValueError: An unknown key, a wrong type, or a missing value, in one line; and what the dataclasses raise.
        SystemExit: After `--help` and `--print_config`, with code 0.
    """
    import jsonargparse

    argv = known_spellings(argv, parser._option_string_actions)
    files = config_files(argv)
    check_files(argv, sections)
    try:
        return vars(parser.instantiate(parser.parse_args(argv)))
    except (jsonargparse.ArgumentError, argparse.ArgumentError) as error:
        wrong = _file_of_mistake(parser, files, error)
        said = one_line(str(error))
        words = _of_one_type(said) or said
        message = one_line(f"{wrong}: {words}") if wrong else words
        raise ValueError(message + _near_miss(str(error), parser)) from None


_TYPES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "<class 'list'>": "a list, as [1, 2]",
    "<class 'dict'>": "keys and values, as {a: 1}",
}
_ONE_TYPE = re.compile(r'Parser key "([^"]+)": Expected an? (.+?)\. Got value: (.*)')
_ONE_TYPE_OR_NULL = re.compile(
    r'Parser key "([^"]+)": Does not validate against any of the Union subtypes Subtypes: '
    r"\[(\S+ '\w+'>|typing\.Literal\[.*?\]), <class 'NoneType'>\] Errors: .* Given value: (.*)"
)
_WORDS_OR_ONE_TYPE = re.compile(
    r'Parser key "([^"]+)": Does not validate against any of the Union subtypes Subtypes: '
    r"\[(.*?)typing\.Literal\[([^\]]*)\](.*?)\] Errors: .* Given value: (.*)"
)


def _of_one_type(message: str) -> str | None:
    """Return in plain words what jsonargparse says of a value that has one type, or null; None of anything else."""
    found = _ONE_TYPE.fullmatch(message) or _ONE_TYPE_OR_NULL.fullmatch(message)
    if found is None:
        return _of_words_or_one_type(message)
    key, kind, value = found.groups()
    null = " or null" if found.re is _ONE_TYPE_OR_NULL else ""
    if words := _TYPES.get(kind):
        return f"{key}={value} must be {words}{null}"
    if not (choices := re.fullmatch(r"typing\.Literal\[(.*)\]", kind)):
        return None
    known = [word.strip(" '\"") for word in choices[1].split(",")]
    return f"{key}={value} must be one of {', '.join(known)}{null}{suggestion(value, known)}"


def _of_words_or_one_type(message: str) -> str | None:
    """Return the same of a value that has one type or is a word, such as `auto`."""
    found = _WORDS_OR_ONE_TYPE.fullmatch(message)
    kind = found and _TYPES.get(f"{found[2]}{found[4]}".strip(", "))
    if found is None or kind is None:
        return None
    words = found[3].replace("'", "")
    return f"{found[1]}={found[5]} must be {words}{', ' if ' or ' in kind else ' or '}{kind}"


def _near_miss(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """Return what was probably meant where a message of jsonargparse is about a key that does not exist."""
    options = parser._option_string_actions
    if found := re.search(r"unrecognized arguments: (--[^\s=]+)", message):
        return suggestion(found[1], options)
    if found := re.search(r"Group '([^']+)' does not accept option '([^']+)'", message):
        return suggestion(f"{found[1]}.{found[2]}", (action.dest for action in options.values()))
    if found := re.search(r"Option '([^']+)' is not accepted", message):
        return suggestion(found[1], (action.dest for action in options.values()))
    return ""


def _file_of_mistake(parser: jsonargparse.ArgumentParser, files: list[str], error: Exception) -> str | None:
    """Return the first of the files that is refused for the same reason as the whole command line."""
    for file in files:
        try:
            parser.parse_path(file, defaults=False)
        except (argparse.ArgumentError, TypeError, ValueError, OSError) as alone:
            if str(alone) == str(error):
                return file
    return None


def _parser_of(kind: type, options: list[Option], prog: str, epilog: str | None) -> jsonargparse.ArgumentParser:
    import jsonargparse
    import yaml

    jsonargparse.set_loader(_KEYS_LIKE_OPTIONS, _load, exceptions=(yaml.YAMLError, ValueError))
    shown = {option.name: option.shown for option in options}

    class HelpFormat(jsonargparse.DefaultHelpFormatter):
        """Show options as they are typed, not as `spell_out` spells them."""

        def _format_action_invocation(self, action: argparse.Action) -> str:
            return shown.get(action.dest) or super()._format_action_invocation(action)

    parser = new_parser(
        prog=prog,
        description=" ".join((kind.__doc__ or "").split()),
        epilog=epilog,
        usage=_usage(options),
        formatter_class=HelpFormat,
        parser_mode=_KEYS_LIKE_OPTIONS,
        allow_abbrev=False,
    )
    for option in options:
        default = {"required": True} if option.required else {"default": option.default}
        parser.add_argument(option.spelling, dest=option.name, type=option.kind, help=option.text, **default)
    return parser


def _usage(options: list[Option]) -> str:
    words = [option.shown for option in options if option.positional]
    words += [option.shown for option in options if option.required and not option.positional]
    return " ".join(["%(prog)s", *words, "[further options below]"])


def _load(text: str) -> Any:
    """Read JSON or YAML; keys of the outermost dictionary may be spelled like options: `text-column`."""
    from data_pipeline.command_line.texts import load_yaml

    try:
        value = json.loads(text)  # as `spell_out` writes it: exact for any text
    except ValueError:
        value = load_yaml(text)
    return {str(key).replace("-", "_"): item for key, item in value.items()} if isinstance(value, dict) else value
