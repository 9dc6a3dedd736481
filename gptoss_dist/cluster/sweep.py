"""A run for each combination of values: `--array "optim.lr=1e-3,3e-4" --array run.seed=0,1` is four runs.

number   optim.lr   run.seed   run.name
0        1e-3       0          NAME-0
1        1e-3       1          NAME-1
2        3e-4       0          NAME-2
3        3e-4       1          NAME-3
"""

from __future__ import annotations

import itertools
import re

from gptoss_dist.config import Config, parse_arguments

MOST_ELEMENTS = 1000
"""SLURM's default of MaxArraySize allows numbers up to 1000."""
_OWN = ("run.name", "run.dir", "checkpoint.dir", "resume")


def sweep(argv: list[str], array: list[str]) -> list[Config]:
    """Return the settings of each run, the last key varying fastest.

    Args:
        argv: The command line of the training.
        array: Texts `KEY=A,B,...`. Commas inside brackets or braces belong to a value, as in `optim.betas=[0.9,0.95]`.

    Raises:
        ValueError: A text has another form, a key is unknown, or a value impossible.
    """
    base, _ = parse_arguments(argv)
    axes = [_values(text) for text in array]
    runs = list(itertools.product(*axes))
    if len(runs) > MOST_ELEMENTS:
        raise ValueError(f"array={' '.join(array)} makes {len(runs)} runs; {MOST_ELEMENTS} are the most")
    found = []
    for number, changes in enumerate(runs):
        own = [f"--run.name={base.run.name}-{number}"]
        if base.run.dir is not None:
            own.append(f"--run.dir={base.run.dir}-{number}")
        if base.checkpoint.dir is not None:
            own.append(f"--checkpoint.dir={base.checkpoint.dir}-{number}")
        found.append(parse_arguments([*argv, *changes, *own])[0])
    return found


def _values(text: str) -> list[str]:
    """Return an option of the training for each value of a text `KEY=A,B,...`."""
    key, equals, values = text.partition("=")
    if not (equals and key.strip() and values.strip()):
        raise ValueError(f"array={text} is no KEY=A,B,...; give for example optim.lr=1e-3,3e-4")
    if key in _OWN:
        raise ValueError(f"array={text}: each run has a {key} of its own already; vary another key")
    parts = re.split(r",(?![^\[{]*[\]}])", values)
    if "" in (part.strip() for part in parts):
        raise ValueError(f"array={text} has an empty value; leave out the comma")
    return [f"--{key}={part.strip()}" for part in parts]
