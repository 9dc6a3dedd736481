"""One lab for all tests of this folder, and settings of a run that trains a step in a fraction of a second."""

from collections.abc import Iterator

import pytest

from tests.slurm.lab import Lab, unless_needed, why_not


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    if reason := why_not():
        unless_needed(f"no SLURM here: {reason}")
    started = Lab()
    try:
        yield started
    finally:
        started.stop()
