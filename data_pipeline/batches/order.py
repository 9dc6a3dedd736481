"""Data order as a pure function: no state to save, random access, the same on any number of ranks.

A *position* counts samples since the start of training and never ends: position p is in epoch p // samples_per_epoch.
Within an epoch the order is a permutation that is computed, not stored: a Feistel network (Luby & Rackoff 1988) over
the next power of four, with cycle walking (Black & Rogaway 2002) to stay inside [0, n).

For example, a split of 5 samples is read with seed 0 in this order:

    position    0  1  2  3  4 | 5  6  7  8  9
    epoch       0  0  0  0  0 | 1  1  1  1  1
    sample      4  3  1  2  0 | 2  3  0  4  1

With micro_batch_size 1, accumulation 2 and world_size 2 the first step reads positions 0 to 3. A column is a
micro-batch:

    rank 0      0  2
    rank 1      1  3

Together the two ranks read samples 4, 3, 1 and 2, as one rank with accumulation 4 would.
"""

import hashlib

import numpy as np

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


def permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the images of `positions` under a pseudo-random bijection of [0, n) chosen by (seed, epoch).

    Memory is proportional to the input, never to n.

    Args:
        positions: Integers in [0, n), of any shape.
        n: The number of samples that are permuted.
        seed: The seed of the order.
        epoch: The epoch, from 0.

    Returns:
        Integers in [0, n), int64 of the same shape.
    """
    assert n >= 1, n
    positions = np.asarray(positions)
    assert positions.size == 0 or (positions.min() >= 0 and positions.max() < n)
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    keys = np.frombuffer(hashlib.sha512(f"{seed}:{epoch}".encode()).digest(), "<u8")[:_ROUNDS]

    values = positions.astype(np.uint64).ravel()
    outside = np.arange(values.size)
    # The network permutes [0, 4**half_bits), less than 4n values. Walking its cycle until the value is inside [0, n)
    # again is a bijection of [0, n), and takes fewer than four rounds on average.
    while outside.size:
        x = values[outside]
        left, right = x >> shift, x & mask
        for key in keys:
            mixed = (right ^ key) * _GOLDEN
            mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
        x = (left << shift) | right
        values[outside] = x
        outside = outside[x >= np.uint64(n)]
    return values.astype(np.int64).reshape(positions.shape)


def global_order(positions: np.ndarray, samples_per_epoch: int, *, seed: int, shuffle: bool = True) -> np.ndarray:
    """Return the index of the sample at each global position.

    Args:
        positions: Global positions, int64 >= 0 of any shape.
        samples_per_epoch: The number of samples of the split.
        seed: The seed of the order.
        shuffle: Whether samples are permuted within each epoch, or read in their own order.

    Returns:
        Indices in [0, samples_per_epoch), int64 of the same shape.
    """
    positions = np.asarray(positions, dtype=np.int64)
    epochs, within = np.divmod(positions, samples_per_epoch)
    if shuffle:
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            within[chosen] = permute(within[chosen], samples_per_epoch, seed, int(epoch))
    return within


def step_positions(
    samples_consumed: int, *, micro_batch_size: int, accumulation: int = 1, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """Return the global positions that `rank` reads in a step, int64 [accumulation, micro_batch_size].

    A step consumes world_size * accumulation * micro_batch_size consecutive positions, so the same global batch
    whatever the number of ranks; micro-batch m of rank r takes the (m * world_size + r)-th run of micro_batch_size.

    Args:
        samples_consumed: The first position of the step.
        micro_batch_size: Samples of a micro-batch.
        accumulation: Micro-batches of a step on each rank.
        rank: The rank that reads.
        world_size: Number of ranks.
    """
    runs = np.arange(accumulation, dtype=np.int64) * world_size + rank
    return samples_consumed + runs[:, None] * micro_batch_size + np.arange(micro_batch_size, dtype=np.int64)
