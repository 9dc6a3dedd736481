"""What a trace says that a process holds is what a real one holds, to the byte."""

import pytest

from tests.planner.conftest import CASES, parameters

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("case", parameters(CASES))
def test_weights_gradients_and_optimizer_are_held_as_foreseen(results, case):
    ranks = [rank for rank in results(case) if rank["foreseen"]]
    assert len(ranks) == len(case.traced())
    for rank in ranks:
        assert rank["foreseen"]["holds"] == rank["there"]["holds"]
        assert all(nbytes > 0 for nbytes in rank["there"]["holds"].values())


@pytest.mark.parametrize("case", parameters(CASES))
def test_nothing_else_is_held(results, case):
    """Of all that a real process had allocated, a few scalars for the report and rows of the head's sums are left."""
    for rank in results(case):
        assert 0 <= rank["there"]["unnamed"] < 128


def test_ranks_hold_unequal_shares(results):
    """Sizes that do not divide: the last rank has less. Else a trace of one rank would do for all."""
    case = next(case for case in CASES if case.name == "4x1")
    held = [sum(rank["there"]["holds"].values()) for rank in results(case)]
    assert held[-1] < held[0]
