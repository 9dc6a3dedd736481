"""Layouts: what fits, what `auto` takes, and refusals that name what would fit."""

import pytest

from gptoss_dist.config import ParallelConfig
from gptoss_dist.parallel.mesh import DeviceLayout, count_data_groups, plan_layout, ranks_per_node, spanned_machines
from gptoss_dist.parallel.parallelize import shard_dimension


def plan(world_size: int, num_experts: int, node_size: int | None = None, **fields) -> DeviceLayout:
    return plan_layout(ParallelConfig(**fields), num_experts, world_size, node_size)


def test_degrees_multiply_to_the_world():
    layout = plan(64, 32, expert_parallel=8, replicate=2)
    assert (layout.replicate, layout.shard, layout.expert_shard, layout.expert_parallel) == (2, 32, 4, 8)
    assert layout.world_size == 64 and str(layout) == "replicate 2 x shard 32 (experts 8 x 4)"
    assert plan(1, 8) == DeviceLayout(1, 1, 1)


def test_context_groups_have_the_same_samples_and_any_experts():
    layout = plan(16, 8, expert_parallel=2, replicate=2, context_parallel=4)
    assert str(layout) == "replicate 2 x shard 8 (experts 2 x 4), context 4"
    assert layout.data_parallel == 4 and [layout.data_rank(rank) for rank in range(16)] == [n // 4 for n in range(16)]
    assert count_data_groups(ParallelConfig(context_parallel=4, replicate=2), 16) == 4


@pytest.mark.parametrize(
    "world, experts, node, replicate, expected",
    [
        (8, 32, 8, 1, 8),
        (64, 32, 8, 1, 8),  # the ranks of a node
        (64, 32, 8, 16, 4),  # the ranks of a shard group
        (8, 6, 8, 1, 2),  # the experts
        (12, 32, 6, 1, 2),  # 4 divides experts and world, but would straddle nodes
        (8, 128, 1, 1, 1),
    ],
)
def test_auto(world, experts, node, replicate, expected):
    assert plan(world, experts, node, expert_parallel="auto", replicate=replicate).expert_parallel == expected


def test_auto_is_one_for_plain_experts():
    assert plan(8, 32, 8, expert_parallel="auto", experts="plain").expert_parallel == 1


@pytest.mark.parametrize(
    "world, node, ep, expected",
    [
        (32, 8, 16, "expert_parallel=16 spans machines of 8 processes: all-to-alls cross the network"),
        (12, 6, 4, "expert_parallel=4 spans machines of 6 processes: all-to-alls cross the network"),
        (32, 8, 8, None),
        (32, 8, 2, None),
        (4, 1, 1, None),
    ],
)
def test_groups_that_span_machines_are_named(world, node, ep, expected):
    assert spanned_machines(plan(world, 32, expert_parallel=ep), node) == expected


def test_rings_that_span_machines_are_named():
    line = spanned_machines(plan(32, 32, context_parallel=16), 8)
    assert line == "context_parallel=16 spans machines of 8 processes: keys and values cross the network"
    assert spanned_machines(plan(32, 32, context_parallel=8), 8) is None


def test_the_launcher_knows_the_ranks_of_a_node(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert ranks_per_node(16) == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert ranks_per_node(16) == 8
    assert plan(16, 32, expert_parallel="auto").expert_parallel == 8


@pytest.mark.parametrize(
    "world, experts, fields, message",
    [
        (8, 32, {"expert_parallel": 3}, "parallel.expert_parallel=3 .* possible: 1, 2, 4, 8, or auto"),
        (
            12,
            6,
            {"expert_parallel": 4},
            "must divide the 6 experts and the 12 processes .* possible: 1, 2, 3, 6, or auto",
        ),
        (8, 32, {"expert_parallel": 8, "replicate": 2}, "the 4 processes .*replicate=2.* possible: 1, 2, 4, or auto"),
        (8, 32, {"expert_parallel": 0}, "parallel.expert_parallel=0 .* possible: 1, 2, 4, 8"),
        (6, 32, {"replicate": 4}, "parallel.replicate=4 does not divide the 6 processes; possible: 1, 2, 3, 6"),
        (6, 32, {"replicate": 0}, "parallel.replicate=0 .* possible: 1, 2, 3, 6"),
        (4, 32, {"expert_parallel": 2, "experts": "plain"}, "needs --parallel.experts megablocks, not plain"),
        (8, 32, {"context_parallel": 3}, "parallel.context_parallel=3 .* the 8 processes .* possible: 1, 2, 4, 8$"),
        (8, 32, {"context_parallel": 8, "replicate": 2}, "must divide the 4 processes .*replicate=2.*: 1, 2, 4$"),
    ],
)
def test_impossible_layouts_name_what_is_possible(world, experts, fields, message):
    with pytest.raises(ValueError, match=message):
        plan(world, experts, **fields)


def test_few_experts_are_sharded_on_another_dimension():
    assert shard_dimension((4, 2880, 5760), 4) == 0
    assert shard_dimension((4, 2880, 5760), 3) == 0  # padded by a third at most
    assert shard_dimension((4, 2880, 5760), 64) == 1
    assert shard_dimension((4, 2880), 64) == 1
    assert shard_dimension((4, 90, 5760), 64) == 2
    assert shard_dimension((4, 7, 9), 64) == 0  # nothing divides: padded
