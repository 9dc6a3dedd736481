r"""An episode as a text of exactly so many units: tokens of a tokenizer, or words.

For a length of 24 and a depth of 0.5, with what is cut marked by |:

    intro                        filler            needle                filler          question
    There is an info hidden.  +  The grass is | +  The key is 5.   +     The grass | +   What is the key? It is
    \_____ 6 units _____/       \_ 3 units _/    \_ 5 units _/         \ 2 units /     \____ 8 units ____/

The filler is cut in the middle of a sentence where the needle or the question follows, as in the original code of
passkey retrieval. So the length is exact whatever a unit is, and the depth is exact to a unit of filler. After a needle
the filler goes on with a whole sentence.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from data_pipeline.needles.tasks import VARIABLES, Episode

Unit = TypeVar("Unit")
Cut = Callable[[str], Sequence[Unit]]

_WORDS = re.compile(r" ?[A-Za-z]+|[0-9]|[^A-Za-z0-9]")
_UNITS_OF_A_SENTENCE = 8  # at least, whatever a unit is
_SENTENCES = 64  # cut at a time, at most


def words_of(text: str) -> list[str]:
    """Cut a text into words with the space before them, single digits, and single other characters.

    A tokenizer that was trained on such texts has a token for each (`configs/passkey_tiny.yaml`).
    """
    return _WORDS.findall(text)


def arrange(episode: Episode, depth: float, length: int, cut: Cut[Unit], generator: random.Random) -> list[Unit]:
    """Return the text of an episode with its question as `length` units.

    Args:
        episode: What it says and asks.
        depth: The place of the needle that is asked for: 0 puts all filler after it, 1 all filler before it.
        length: How many units to return.
        cut: What makes units of a text.
        generator: Draws the places of the other needles. Of `variables` the rest of a chain comes after its beginning.

    Raises:
        ValueError: The episode alone is longer than that.
    """
    head, needles, tail = _without_filler(episode, cut)
    room = length - len(head) - len(tail) - sum(map(len, needles))
    if room < 0:
        raise too_short(episode.task, length, length - room)
    places = _places(episode, depth, room, generator)
    sentences, units, before = episode.filler(), list(head), 0
    for place, index in sorted((place, index) for index, place in enumerate(places)):
        units += _filler(sentences, place - before, cut)
        units += needles[index]
        before = place
    return [*units, *_filler(sentences, room - before, cut), *tail]


def least_length(episode: Episode, cut: Cut[Unit]) -> int:
    """Return how many units an episode has without any filler: the least `length` for `arrange`."""
    head, needles, tail = _without_filler(episode, cut)
    return len(head) + len(tail) + sum(map(len, needles))


def too_short(task: str, length: int, least: int) -> ValueError:
    """Return the error that says so."""
    return ValueError(
        f"a length of {length} is too little for the task {task}, which takes {least} without any filler; give "
        f"{least} or more"
    )


def _without_filler(episode: Episode, cut: Cut[Unit]) -> tuple[Sequence[Unit], list[Sequence[Unit]], Sequence[Unit]]:
    """Return the beginning, the needles and the question of an episode."""
    return cut(episode.intro), [cut(" " + needle) for needle in episode.needles], cut(" " + episode.question)


def _places(episode: Episode, depth: float, room: int, generator: random.Random) -> list[int]:
    """Return before which unit of the filler each needle stands."""
    asked = round(depth * room)
    if episode.task != "variables":
        return [
            asked if i == episode.asked else int(generator.random() * (room + 1)) for i in range(len(episode.needles))
        ]
    places: list[int] = []
    for first in range(0, len(episode.needles), VARIABLES):
        begin = asked if first == episode.asked else int(generator.random() * (room + 1))
        rest = [begin + int(generator.random() * (room - begin + 1)) for _ in range(VARIABLES - 1)]
        places += [begin, *sorted(rest)]
    return places


def _filler(sentences: Iterator[str], count: int, cut: Cut[Unit]) -> list[Unit]:
    """Return the first `count` units of the next sentences; the rest of the last one is left out."""
    units: list[Unit] = []
    while (missing := count - len(units)) > 0:
        some = islice(sentences, min(_SENTENCES, 1 + missing // _UNITS_OF_A_SENTENCE))
        units += cut("".join(" " + sentence for sentence in some))
    return units[:count]
