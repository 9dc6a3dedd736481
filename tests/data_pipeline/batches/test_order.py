"""The order is a bijection that depends on (seed, epoch) only, and ranks share it without overlap."""

import numpy as np
import pytest

from data_pipeline.batches import order as order_module
from data_pipeline.batches.order import global_order, permute, step_positions
from tests.support.worked_examples import integers, tables_of


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 64, 65, 1000, 4096, 4097])
def test_permute_is_a_bijection(n):
    for seed, epoch in ((0, 0), (1, 0), (0, 1), (2**40, 7)):
        assert sorted(permute(np.arange(n), n, seed, epoch).tolist()) == list(range(n))


def test_permute_is_pointwise_and_reaches_beyond_32_bits():
    n = 10**13 + 7
    positions = np.array([[0, 1], [n - 1, n // 2]])
    images = permute(positions, n, 3, 0)
    assert images.shape == (2, 2) and images.dtype == np.int64 and len(np.unique(images)) == 4
    assert (images >= 0).all() and (images < n).all() and images.max() > 2**32
    assert permute(positions[1, 1], n, 3, 0) == images[1, 1]


def test_permutations_look_independent():
    n = 5000
    orders = [permute(np.arange(n), n, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for i, order in enumerate(orders):
        for other in (*orders[:i], np.arange(n)):
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.06  # 4 standard deviations of 1 / sqrt(n)
        # Neighbours are scattered too, not only displaced.
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06


def test_every_epoch_reads_every_sample_once():
    order = global_order(np.arange(30), 10, seed=5)
    epochs = order.reshape(3, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert global_order(np.arange(25), 10, seed=5, shuffle=False).tolist() == [*range(10), *range(10), *range(5)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_partition_the_step(world_size):
    layout = {"micro_batch_size": 3, "accumulation": 2, "world_size": world_size}
    per_rank = [step_positions(100, rank=rank, **layout) for rank in range(world_size)]
    assert per_rank[-1][1].tolist() == [100 + (world_size + world_size - 1) * 3 + i for i in range(3)]
    everything = np.concatenate([p.ravel() for p in per_rank])
    assert sorted(everything.tolist()) == list(range(100, 100 + 6 * world_size))


def test_the_example_of_order():
    """The tables at the top of order.py."""
    samples, ranks = tables_of(order_module.__doc__)
    positions = integers(samples["position"])
    assert positions == list(range(10))
    assert integers(samples["epoch"]) == [position // 5 for position in positions]
    assert integers(samples["sample"]) == global_order(np.array(positions), 5, seed=0).tolist()

    layout = {"micro_batch_size": 1, "accumulation": 2, "world_size": 2}
    assert list(ranks) == ["rank 0", "rank 1"]
    for rank, cells in enumerate(ranks.values()):
        assert integers(cells) == step_positions(0, rank=rank, **layout).ravel().tolist()
    read = global_order(step_positions(0, micro_batch_size=1, accumulation=4).ravel(), 5, seed=0).tolist()
    assert "read samples {}, {}, {} and {}, as one rank with accumulation 4".format(*read) in order_module.__doc__
