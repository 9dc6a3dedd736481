"""The order that training consumes: the same on any number of ranks and threads, and across a resume anywhere."""

import itertools
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline import BatchLoader, MixtureDataset, Stage, WeightedDataset, open_dataset
from tests.support.token_data import write_dataset

T, ROWS = 16, 12  # samples a step


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    generator = np.random.default_rng(2)
    return [
        write_dataset(tmp_path_factory.mktemp("loader"), {"train": generator.integers(2, 30, n)}, seed=n)
        for n in (70, 40, 90)
    ]


def open_all(directories, kind):
    packing, mixed = kind
    datasets = [open_dataset(path, packing=packing, seq_len=T, seed=7) for path in directories]
    if not mixed:
        return datasets[0]
    sources = [
        WeightedDataset("a", datasets[0], 0.6),
        WeightedDataset("b", datasets[1], 0.3, 0.5),
        WeightedDataset("c", datasets[2], 0.1),
    ]
    return MixtureDataset(sources, stages=[Stage(100, {"a": 1, "c": 2})])


def rows(batches):
    """The samples of micro-batches in order, as (inputs, labels, document ids), whatever their shape."""
    for batch in batches:
        ids = batch.get("document_ids", torch.zeros_like(batch["labels"]))
        yield from zip(*(x.tolist() for x in (batch["input_ids"], batch["labels"], ids)))


def samples(batches, varlen):
    """The same, with a padding-free row taken apart into its documents."""
    if not varlen:
        return list(rows(batches))
    found = []
    for inputs, labels, documents in rows(batches):
        bounds = [t for t in range(len(inputs)) if t == 0 or documents[t] != documents[t - 1]] + [len(inputs)]
        found += [(inputs[a:b], labels[a:b]) for a, b in itertools.pairwise(bounds)]
    return found


def consume(dataset, steps, start, world_size, accumulation, workers, varlen):
    """Samples of the global batches in order of consumption, put together from all ranks."""
    read_plan = {
        "micro_batch_size": ROWS // (world_size * accumulation),
        "accumulation": accumulation,
        "world_size": world_size,
        "samples_consumed": start,
        "workers": workers,
    }
    loaders = [BatchLoader(dataset, rank=rank, document_mask=True, **read_plan) for rank in range(world_size)]
    found = []
    for _ in range(steps):
        ranks = [next(loader) for loader in loaders]
        # Micro-batch m of rank r is run m * world_size + r.
        found += samples([ranks[r][m] for m in range(accumulation) for r in range(world_size)], varlen)
    assert {loader.samples_consumed for loader in loaders} == {start + steps * ROWS}
    for loader in loaders:
        loader.close()
    return found


KINDS = [(packing, mixed) for packing in ("contiguous", "best_fit", "varlen") for mixed in (False, True)]


@pytest.mark.heavy
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}{' mixture' if kind[1] else ''}")
def test_consumed_order_is_the_same_everywhere(directories, kind, monkeypatch):
    monkeypatch.setattr("data_pipeline.batches.loader._PLANNED_AT_ONCE", (50 * T, 100))  # several blocks of steps
    dataset, varlen = open_all(directories, kind), kind[0] == "varlen"
    n = dataset.samples_per_epoch
    edge = n // ROWS * ROWS  # a step from here on crosses the end of the epoch, or begins at it
    steps = 2 * n // ROWS + 2  # two epochs of it, and for the mixture an end of a source and a stage
    options = {"document_mask": True, "micro_batch_size": 1, "workers": 0}
    with BatchLoader(dataset, **options) as one_by_one:
        expected = samples([next(one_by_one)[0] for _ in range(steps * ROWS)], varlen)
    for world_size, accumulation in ((1, 1), (1, 4), (2, 3), (3, 2), (4, 1)):
        for workers in (0, 2):
            assert consume(dataset, steps, 0, world_size, accumulation, workers, varlen) == expected
    # Resumed in the middle of an epoch, and at its edges, by other ranks and threads than before.
    again = open_all(directories, kind)
    for start, world_size, workers in ((ROWS * 2, 3, 2), (edge, 4, 0), (edge + ROWS, 2, 2), (n, 1, 2)):
        tail = consume(again, 3, start, world_size, 1, workers, varlen)
        assert tail == expected[start : start + 3 * ROWS]
    if not kind[1]:
        assert sorted(expected[:n]) == sorted(expected[n : 2 * n]) != expected[:n] != expected[n : 2 * n]
    else:
        used = dataset.usage(steps * ROWS)[1]
        assert used.samples == dataset.sources[1].dataset.samples_per_epoch // 2  # its limit was reached on the way


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_that_ends_gives_all_whole_steps(directories, workers):
    dataset = open_dataset(directories[0], seq_len=T)
    mixture = MixtureDataset([WeightedDataset("only", dataset, None, 1.5)])
    end = mixture.positions_total
    with BatchLoader(mixture, micro_batch_size=5, workers=workers, prefetch=3) as loader:
        steps = list(loader)
    assert len(steps) == end // 5 and loader.samples_consumed == end // 5 * 5
    expected = mixture.samples(np.arange(loader.samples_consumed))
    assert np.array_equal(torch.cat([batch["input_ids"] for (batch,) in steps]).numpy(), expected[:, :-1])


def test_reading_ahead_hides_slow_reads(directories, monkeypatch):
    """Two threads read two steps at a time, in order, while the loop computes."""
    dataset = open_dataset(directories[0], seq_len=T)
    read, busy, most = dataset.fill, [], [0]

    def slow(*arguments):
        busy.append(threading.current_thread())
        most[0] = max(most[0], len(busy))
        time.sleep(0.05)
        busy.pop()
        return read(*arguments)

    monkeypatch.setattr(dataset, "fill", slow)
    with BatchLoader(dataset, micro_batch_size=2, workers=2, prefetch=4) as loader:
        next(loader)
        waits = []
        for _ in range(6):
            time.sleep(0.06)  # the step's computation
            start = time.perf_counter()
            next(loader)
            waits.append(time.perf_counter() - start)
    assert most[0] == 2 and sorted(waits)[3] < 0.03


def test_a_look_up_is_bounded_however_short_the_documents(tmp_path):
    """8 million places for tokens, the other bound, hold a million documents here."""
    path = write_dataset(tmp_path, {"train": np.full(250_000, 9)})
    dataset = open_dataset(path, packing="best_fit", seq_len=480)
    with BatchLoader(dataset, micro_batch_size=2, accumulation=2, prefetch=0) as loader:
        most = 0
        for _ in range(200):
            next(loader)
            most = max(most, sum(len(read_plan.reads_R4) for step in loader._planned for read_plan in step))
    assert 15_000 < most <= 16_384
    with BatchLoader(open_dataset(path, seq_len=100_000), micro_batch_size=1, prefetch=0) as loader:
        next(loader), next(loader)
        assert len(loader._planned) == (1 << 23) // 100_000 - 1


def test_a_million_documents_open_at_once_and_are_read_in_flat_memory(tmp_path):
    """The figures at full size, 1 GB and ten million documents, are in docs/data/reading.md; these bounds are loose."""
    path = write_dataset(tmp_path, {"train": np.full(1_000_000, 50)})

    def memory() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    start = time.process_time()
    dataset = open_dataset(path, seq_len=2048)
    with BatchLoader(dataset, micro_batch_size=8) as loader:
        next(loader)
        assert time.process_time() - start < 1
        for _ in range(100):
            next(loader)
        before, start, steps = memory(), time.process_time(), dataset.samples_per_epoch // 8
        for _ in range(steps):
            next(loader)
        rate = steps * 8 * 2048 / (time.process_time() - start)
        assert memory() - before < 8 * 2**20 and rate > 3e7
