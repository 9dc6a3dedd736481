"""From what people type to what jsonargparse understands: a name and one value for every option.

With lists `sources` (positional) and `filter`, and a bool `overwrite`,

    a b --filter x --overwrite --filter y

becomes

    --filter+=["x"] --overwrite=true --filter+=["y"] --sources=["a", "b"]

Lists are JSON, because YAML would read the texts `null` or `a: b` as something else. `+` adds to what is there, be it
from a file; the others take its place. So does a list that is given as `--train a b`, but what is typed of it adds up:
`--train a --train b` becomes `--train=["a", "b"]`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from data_pipeline.command_line.options import Option


def spell_out(argv: list[str], options: list[Option]) -> list[str]:
    """Return a command line in which each option has a name and one value; what is not of `options` stays as it is."""
    by_name = {_plain(option.spelling): option for option in options}
    words: list[str] = []
    spelled: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            words, rest = words + rest, []
        elif not _names_an_option(argument, "-"):
            words.append(argument)
        else:
            name, equals, value = argument.partition("=")
            option, opposite = by_name.get(_plain(name)), by_name.get(_opposite(name))
            if option is None and opposite is not None and opposite.is_flag and not equals:
                spelled.append(f"{opposite.spelling}=false")
            elif option is None:
                # `--config FILE`, `--help`, or a mistake, of which jsonargparse then tells.
                spelled += [argument, *_take(rest, 1 if name == "--config" and not equals else 0)]
            elif equals or not option.is_flag:
                many = option.is_list and option.several
                spelled = _with(spelled, option, [value] if equals else _take(rest, len(rest) if many else 1))
            else:
                spelled.append(f"{option.spelling}=true")
    return _with_words(spelled, words, options)


def known_spellings(argv: list[str], known: Iterable[str]) -> list[str]:
    """Return a command line whose options have dashes and underscores where those in `known` have them."""
    spellings = {_plain(name): name for name in known}
    spelled = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        spelled.append(spellings.get(_plain(name), name) + equals + value)
    return spelled


def _plain(name: str) -> str:
    return name.replace("_", "-")


def _opposite(name: str) -> str:
    return "--" + _plain(name).removeprefix("--no-")


def _take(rest: list[str], most: int) -> list[str]:
    """Remove up to `most` values from the front of `rest` and return them."""
    taken: list[str] = []
    while rest and len(taken) < most and not _names_an_option(rest[0], "--"):
        taken.append(rest.pop(0))
    return taken


def _names_an_option(word: str, dashes: str) -> bool:
    """Return whether a word is no value: it begins with `dashes`, and unlike a text has no space in its name."""
    return word.startswith(dashes) and word != "-" and " " not in word.partition("=")[0]


def _spelled(option: Option, values: list[str]) -> list[str]:
    if not values:
        return [option.spelling]  # jsonargparse says that it expects one
    if not option.is_list:
        return [f"{option.spelling}={values[0]}"]
    return [f"{option.spelling}{'' if option.several else '+'}={json.dumps(values)}"]


def _with(spelled: list[str], option: Option, values: list[str]) -> list[str]:
    """Return `spelled` and an option with its values, after those of the same list that are in `spelled`."""
    if not (option.is_list and option.several and values):
        return spelled + _spelled(option, values)
    others = [word for word in spelled if not word.startswith(f"{option.spelling}=")]
    return others + _spelled(option, typed_values(spelled, option) + values)


def _with_words(spelled: list[str], words: list[str], options: list[Option]) -> list[str]:
    option = next((option for option in options if option.positional), None)
    if option is None or not words:
        return spelled + words
    own = words if option.is_list else words[:1]
    return _with(spelled, option, own) + words[len(own) :]


def typed_values(spelled: list[str], option: Option) -> list[str]:
    """Return the values of a list that stand on a command line which `spell_out` returned."""
    beginning = f"{option.spelling}{'' if option.several else '+'}="
    given = [word.removeprefix(beginning) for word in spelled if word.startswith(beginning)]
    return [value for values in given for value in json.loads(values)]
