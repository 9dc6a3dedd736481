"""Ranks are named by their hosts, from what they have said and from what the launcher says."""

import pytest

from gptoss_dist.distributed.hosts import by_host, expand, expected_hosts, listed, tasks_of_nodes


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("node1", ["node1"]),
        ("a,b", ["a", "b"]),
        ("gpu[07-09,12],login", ["gpu07", "gpu08", "gpu09", "gpu12", "login"]),
        ("r[1-2]n[04-05]-x", ["r1n04-x", "r1n05-x", "r2n04-x", "r2n05-x"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
    ],
)
def test_a_node_list_of_slurm(nodes, names):
    assert expand(nodes) == names


def test_numbers_of_tasks():
    assert tasks_of_nodes("4(x2),3") == [4, 4, 3] and tasks_of_nodes("2") == [2]


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([0, 1, 2], "ranks 0-2"), ([9, 0, 1, 7], "ranks 0-1, 7, 9")]
)
def test_numbers_of_ranks(ranks, text):
    assert listed(ranks) == text


def test_many_ranks_are_cut():
    assert listed(range(0, 100, 2)) == "ranks 0, 2, 4, 6, 8, 10, 12, 14, ..."
    assert by_host(range(12), [f"node{n}" for n in range(12)]).endswith("node7 (rank 7) and 4 more hosts")


def test_hosts_by_name():
    hosts = {8: "node2", 9: "node2", 16: "node3"}
    assert by_host([8, 9, 16, 20], hosts) == "node2 (ranks 8-9), node3 (rank 16), rank 20"


SLURM = {"SLURM_STEP_NODELIST": "gpu[1-3]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}


def test_expected_hosts():
    assert expected_hosts(5, SLURM, {}) == {0: "gpu1", 1: "gpu1", 2: "gpu2", 3: "gpu2", 4: "gpu3"}
    for other in ("cyclic", "plane=2"):
        assert expected_hosts(5, SLURM | {"SLURM_DISTRIBUTION": other}, {}) == {}
    within_nodes = SLURM | {"SLURM_DISTRIBUTION": "block:cyclic"}
    assert expected_hosts(5, within_nodes, {}) == expected_hosts(5, SLURM, {})
    torchrun = {"LOCAL_WORLD_SIZE": "2"}
    assert expected_hosts(4, torchrun, {3: "b"}) == {0: "host 1 of 2", 1: "host 1 of 2", 2: "b", 3: "b"}
    # One task on each node, which is a launcher of its own.
    tasks = {"SLURM_STEP_NODELIST": "gpu[1-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert expected_hosts(4, tasks | torchrun, {0: "gpu1"})[1] == "gpu1"
    assert expected_hosts(3, torchrun, {}) == expected_hosts(3, {}, {0: "a"}) == {}
    assert expected_hosts(5, SLURM | {"SLURM_STEP_TASKS_PER_NODE": "two"}, {}) == {}
