"""What a trace says that a process sends is what a real one sends: every collective, its ranks, its bytes."""

from collections import Counter

import pytest
import torch

from tests.planner.conftest import CASES, parameters

pytestmark = pytest.mark.distributed
FOUR = [case for case in CASES if case.world == 4]
LEARNED = next(case for case in CASES if "learned" in case.name)
ROW_BYTES = 32 * 4


def counted(collectives: list) -> Counter:
    """Count equal calls: ZeRO 3 gathers ahead in the order of a set."""
    return Counter((name, tuple(group), sent) for name, group, sent in collectives)


@pytest.mark.parametrize("case", parameters([case for case in FOUR if case is not LEARNED]))
def test_every_collective_is_foreseen(results, case):
    for rank in results(case):
        there = counted(rank["there"]["collectives"])
        assert sum(sent > 0 for _, _, sent in there) >= 3
        if rank["foreseen"]:
            assert counted(rank["foreseen"]["collectives"]) == there


def test_learned_routing_changes_all_to_alls_only(results):
    """And those by as much as rows differ from their balanced number, at most by the imbalance of the experts."""
    ranks = results(LEARNED)
    sent_QRE = torch.tensor([rank["there"]["sent_rows"][0] for rank in ranks]).float()  # one layer
    ratios = []
    for index, rank in enumerate(ranks):
        if not rank["foreseen"]:
            continue
        foreseen, there = rank["foreseen"]["collectives"], rank["there"]["collectives"]
        assert [c[:2] for c in foreseen] == [c[:2] for c in there]
        rows, foreseen_rows = [], []
        for before, after in zip(foreseen, there):
            if before[0] == "alltoall_base_" and before[2] > 1000:  # not the counts
                foreseen_rows.append(before[2] / ROW_BYTES)
                rows.append(after[2] / ROW_BYTES)
            else:
                assert before == after
        partner = index ^ 1
        away, back = sent_QRE[index, partner % 2].sum().item(), sent_QRE[partner, index % 2].sum().item()
        assert rows == [away, back, away, back]  # to the experts and back, then their gradients
        balanced = sent_QRE[index].sum().item() / 2
        assert foreseen_rows == [balanced] * 4
        ratio = sum(rows) / sum(foreseen_rows)
        pair_QRE = sent_QRE[[index, partner]]
        assert ratio != 1 and 2 - ratio <= (imbalance := (pair_QRE.amax((1, 2)) / pair_QRE.mean((1, 2))).max())
        assert ratio <= imbalance
        ratios.append(ratio)
    assert len(ratios) == len(LEARNED.traced())
