"""Positions that are never read: the loader against a slow reference, on layouts, threads, packings and mixtures."""

import itertools

import numpy as np
import pytest
import torch

from data_pipeline import BatchLoader, MixtureDataset, Stage, WeightedDataset, open_dataset
from data_pipeline.batches.mixture_changes import order_id
from data_pipeline.batches.skipping import SkippedPositions
from tests.support.token_data import write_dataset

T = 16
KINDS = [(packing, mixed) for packing in ("contiguous", "best_fit", "varlen") for mixed in (False, True)]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    generator = np.random.default_rng(2)
    return [
        write_dataset(tmp_path_factory.mktemp("skipping"), {"train": generator.integers(2, 30, n)}, seed=n)
        for n in (50, 30)
    ]


def open_all(directories, packing, mixed):
    """One dataset, or a mixture whose weights change and one source of which is used up on the way."""
    a, b = (open_dataset(path, packing=packing, seq_len=T, seed=7) for path in directories)
    if not mixed:
        return a
    sources = [WeightedDataset("a", a, 0.6), WeightedDataset("b", b, 0.4, 0.5)]
    return MixtureDataset(sources, stages=[Stage(70, {"a": 1, "b": 3})])


def draw_ranges(generator, end):
    """Ranges that overlap, touch, begin at 0, or have one position, as it happens."""
    firsts = generator.integers(0, end, generator.integers(0, 6))
    return [(int(first), int(first + generator.integers(1, 25))) for first in firsts]


def read(dataset, ranges, start, steps, layout, workers, prefetch):
    """The micro-batches that all ranks read of some steps in their global order, and the place after each step."""
    world_size, accumulation, size = layout
    options = {
        "micro_batch_size": size,
        "accumulation": accumulation,
        "world_size": world_size,
        "workers": workers,
        "prefetch": prefetch,
        "samples_consumed": start,
        "skipped": SkippedPositions(ranges),
    }
    loaders = [BatchLoader(dataset, rank=rank, **options) for rank in range(world_size)]
    batches, places = [], []
    for _ in range(steps):
        ranks = [next(loader) for loader in loaders]
        batches += [ranks[r][m] for m in range(accumulation) for r in range(world_size)]
        (place,) = {loader.samples_consumed for loader in loaders}
        places.append(place)
    for loader in loaders:
        loader.close()
    return batches, places


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("packing", "mixed"), KINDS, ids=lambda value: {True: "mixture", False: "one"}.get(value, value)
)
def test_it_reads_what_a_slow_reference_reads(directories, packing, mixed, monkeypatch):
    monkeypatch.setattr("data_pipeline.batches.loader._PLANNED_AT_ONCE", (50 * T, 100))  # several blocks of steps
    dataset, generator = open_all(directories, packing, mixed), np.random.default_rng(3)
    for _ in range(25):
        ranges = draw_ranges(generator, 150)
        skipped = {position for first, end in ranges for position in range(first, end)}
        place = int(generator.integers(0, 40))
        expected = iter([position for position in range(place, 1000) if position not in skipped])
        for _ in range(3):  # each goes on where the one before has stopped, as other ranks
            layout = tuple(int(n) for n in generator.integers(1, 4, 3))
            steps, size = int(generator.integers(1, 5)), layout[2]
            workers, prefetch = ((0, 0), (1, 2), (2, 5))[generator.integers(3)]
            batches, places = read(dataset, ranges, place, steps, layout, workers, prefetch)
            for batch in batches:
                positions = np.array(list(itertools.islice(expected, size)))
                reference = dataset.micro_batch(dataset.order(positions))
                assert batch.keys() == reference.keys()
                assert all(np.array_equal(batch[name].numpy(), array) for name, array in reference.items())
            place = places[-1]
            assert place == positions[-1] + 1 and places == sorted(places)
        assert place < 1000


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_end_give_all_whole_steps_of_what_is_left(directories, workers):
    mixture = MixtureDataset([WeightedDataset("only", open_dataset(directories[0], seq_len=T), None, 1.5)])
    end = mixture.positions_total
    for ranges in ([(3, 10)], [(end - 6, end)], [(end - 2, end + 9)], [(0, end - 4)]):
        left = [p for p in range(end) if not any(a <= p < b for a, b in ranges)]
        with BatchLoader(
            mixture, micro_batch_size=3, workers=workers, prefetch=3, skipped=SkippedPositions(ranges)
        ) as loader:
            found = torch.cat([batch["input_ids"] for (batch,) in loader]).numpy()
            assert loader.samples_consumed == left[len(left) // 3 * 3 - 1] + 1
        assert np.array_equal(found, mixture.samples(np.array(left[: len(left) // 3 * 3]))[:, :-1])


def test_reads_and_positions_are_counted_as_one_would_by_hand():
    generator = np.random.default_rng(1)
    for _ in range(50):
        ranges = draw_ranges(generator, 100)
        skipped = SkippedPositions(ranges)
        gone = {position for first, end in ranges for position in range(first, end)}
        kept = [position for position in range(200) if position not in gone]
        assert skipped.total == len(gone) and skipped.positions(np.arange(len(kept))).tolist() == kept
        assert [skipped.reads_before(p) for p in range(201)] == [sum(k < p for k in kept) for p in range(201)]
        assert all(end < first for (_, end), (first, _) in itertools.pairwise(skipped.ranges))
    for wrong in ((5, 5), (7, 3), (-1, 4)):
        with pytest.raises(ValueError, match=f"positions {wrong[0]} to {wrong[1]} are no range"):
            SkippedPositions([wrong])


def test_an_order_is_told_from_others_by_what_decides_it(directories):
    a, b = (open_dataset(path, seq_len=T) for path in directories)

    def of(sources, **options):
        return order_id(MixtureDataset(sources, **options).state())

    pair = [WeightedDataset("a", a, 2), WeightedDataset("b", b, 1)]
    same = of(pair, stages=[Stage(9, {"a": 1})])
    # Neither the order of the sources nor their names decide anything.
    renamed = [WeightedDataset("x", b, 2), WeightedDataset("y", a, 4)]
    assert same == of(renamed, stages=[Stage(9, {"y": 1})])
    others = [
        of(pair),
        of(pair, stages=[Stage(8, {"a": 1})]),
        of(pair, start=5),
        of([*pair[:1]]),
        of(pair, consumed={a.content_sha256: 3}),
        of([pair[0], WeightedDataset("b", b, 1, 2)]),
    ]
    assert len({same, *others}) == 7
