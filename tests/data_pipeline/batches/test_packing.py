"""Packing against slow references: best fit bin by bin, each token predicted once, the loss of documents alone."""

import hashlib
import itertools
import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipeline import BatchLoader, BestFitDataset, DocumentDataset, open_dataset, validation_batches
from data_pipeline.batches import best_fit, reading
from data_pipeline.batches.best_fit import BestFit
from data_pipeline.shards.manifest import Manifest, open_shards
from tests.support.token_data import write_dataset
from tests.support.worked_examples import integers, tables_of

T = 24


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    generator = np.random.default_rng(1)
    lengths = np.clip(generator.lognormal(2.3, 0.9, 300).astype(int), 1, 90)
    lengths[:6] = (1, 2, T, T + 1, T + 2, 3 * T + 1)
    return write_dataset(tmp_path_factory.mktemp("packing"), {"train": lengths, "validation": lengths[:41]})


def documents(directory, split="train"):
    shards = open_shards(directory, Manifest.read(directory), split)
    return [shard[i].tolist() for shard in shards for i in range(len(shard))]


def slow_best_fit(lengths, capacity):
    """One piece after the other into the fullest row that has room; the rooms that are left, sorted."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        best = min((room for room in rooms if room >= length), default=None)
        if best is None:
            rooms.append(capacity - length)
        else:
            rooms[rooms.index(best)] = best - length
    return sorted(rooms)


def rows_of(plan):
    """(index, length) of the pieces of each row; asked for in another order, so that rows could be mistaken."""
    asked = np.random.default_rng(0).permutation(len(plan))
    pieces, lengths, counts = plan.rows(asked)
    pairs, rows = iter(zip(pieces.tolist(), lengths.tolist(), strict=True)), [None] * len(plan)
    for row, count in zip(asked.tolist(), counts.tolist(), strict=True):
        rows[row] = list(itertools.islice(pairs, count))
    assert next(pairs, None) is None
    assert rows == [slow_row(plan, i) for i in range(len(plan))]
    return rows


def slow_row(plan, i):
    """One row by itself: what was put into it last, and so on; from the longest to the shortest."""
    found, place = [], plan._content[plan._firsts.searchsorted(i, side="right") - 1]
    while place >= 0:
        length, each, first, placed, place = plan._table[place].tolist()
        begin = placed + (i - first) * each
        found += [(plan._order.item(p), length) for p in range(begin, begin + each)]
    return found[::-1]


@pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
def test_best_fit_is_best_fit(capacity):
    generator = np.random.default_rng(capacity)
    for lengths in (
        np.empty(0, np.int64),
        generator.integers(1, capacity + 1, 400),
        np.clip(generator.lognormal(2, 1.5, 600).astype(int), 1, capacity),
        generator.choice([1, capacity // 3 + 1, capacity // 2 + 1, capacity], 500).clip(1, capacity),
    ):
        plan = BestFit(lengths, capacity)
        rows = rows_of(plan)
        pieces = list(itertools.chain(*rows))
        assert sorted(pieces) == list(enumerate(lengths))  # each in one place
        rooms = [capacity - sum(length for _, length in row) for row in rows]
        assert sorted(rooms) == slow_best_fit(lengths.tolist(), capacity) and min(rooms, default=0) >= 0


@pytest.mark.parametrize(("capacity", "at_once"), [(30, 64), (5000, 1 << 20), (5000, 1 << 8)])
def test_pieces_are_sorted_a_part_at_a_time(monkeypatch, capacity, at_once):
    lengths = np.random.default_rng(0).integers(1, capacity + 1, 500)
    whole = BestFit(lengths, capacity)
    monkeypatch.setattr(best_fit, "_SORTED_AT_ONCE", at_once)
    monkeypatch.setattr(best_fit, "_COPIED_AT_ONCE", 60)
    order, counts = best_fit._longest_first(lengths, capacity)
    assert order.tolist() == np.argsort(-lengths, kind="stable").tolist()
    assert counts.tolist() == [(lengths == capacity - spare).sum() for spare in range(capacity)]
    assert rows_of(BestFit(lengths, capacity)) == rows_of(whole)


@pytest.mark.parametrize("packing", ["contiguous", "best_fit", "varlen"])
def test_samples_that_do_not_exist(directory, packing):
    dataset = open_dataset(directory, packing=packing, seq_len=T)
    last = dataset.samples_per_epoch - 1
    assert dataset.micro_batch(np.array([0, last]))["input_ids"].size
    for wrong in (-1, last + 1):
        with pytest.raises(IndexError, match=f": sample {wrong} is none of 0 to {last}"):
            dataset.micro_batch(np.array([0, wrong]))
    assert not dataset.micro_batch(np.array([], np.int64))["input_ids"].size


@pytest.mark.parametrize(
    ("packing", "version", "digest"),
    [
        ("contiguous", 1, "d041eaa320a50ea4"),
        ("best_fit", 2, "7058e86fa12e1da7"),
        ("varlen", 1, "be45f6afcc0fd143"),
    ],
)
def test_a_plan_is_forever(tmp_path, packing, version, digest):
    """A resumed run counts on the same samples in the same order. If this fails the change loses the place in the data
    of every checkpoint: raise `plan_version`, with which they are refused, and write the new digest here.
    """
    write_dataset(tmp_path, {"train": [7 * i * i % 83 + 1 for i in range(200)]})
    dataset, plan = open_dataset(tmp_path, packing=packing, seq_len=T, seed=3), []
    for index in dataset.order(np.arange(2 * dataset.samples_per_epoch)):
        starts, lengths, _ = dataset.spans(np.array([index]))
        places = np.cumsum(lengths) - lengths
        plan.append([piece for piece in zip(*(x.tolist() for x in (starts, lengths, places))) if piece[0] >= 0])
    found = hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16]
    assert (dataset.plan_version, found) == (version, digest)


def test_a_million_documents_pack_in_a_moment():
    """Ten million take ten times as long; the figure is in docs/data/packing.md."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.2, 1_000_000).astype(int), 1, 2048)
    start = time.process_time()
    plan = BestFit(lengths, 2048)
    assert time.process_time() - start < 3
    assert 1 - lengths.sum() / (2048 * len(plan)) < 1e-3


def predictions(batch):
    """{document id of a row: (inputs, labels)} of what carries a loss, in order."""
    found = []
    for inputs, labels, ids in zip(*(batch[k].tolist() for k in ("input_ids", "labels", "document_ids"))):
        assert ids == sorted(ids)
        for document in sorted(set(ids)):
            places = [t for t, d in enumerate(ids) if d == document]
            if labels[places[0]] != -100:
                found.append(([inputs[t] for t in places], [labels[t] for t in places]))
            else:
                assert all(labels[t] == -100 for t in places)  # padding, or a validation sample that is there twice
    return found


def test_best_fit_predicts_every_token_but_first_ones_once(directory):
    dataset = BestFitDataset(directory, seq_len=T)
    batch = dataset.micro_batch(np.arange(dataset.samples_per_epoch))
    assert {array.shape for array in batch.values()} == {(dataset.samples_per_epoch, T)}
    assert {array.dtype for array in batch.values()} == {np.dtype("int64")}
    expected, cut = [], 0
    for tokens in documents(directory):
        cut += len(tokens) - 1 > T
        for start in range(0, len(tokens) - 1, T):
            expected.append((tokens[start : start + T][: len(tokens) - 1 - start], tokens[start + 1 : start + T + 1]))
    assert sorted(predictions(batch)) == sorted(expected)
    padding = (batch["labels"] == -100).mean()
    assert dataset.padding_share == pytest.approx(padding) and padding < 0.05
    assert (batch["input_ids"][batch["labels"] == -100] == dataset.eot_id).all()
    assert dataset.inputs_total == sum(len(labels) for _, labels in expected)
    with_inputs = sum(len(tokens) > 1 for tokens in documents(directory))
    assert dataset.cut_share == pytest.approx(cut / with_inputs)
    some = np.array([5, 0, 5, 11])
    part = dataset.micro_batch(some)
    assert all(np.array_equal(part[name], batch[name][some]) for name in batch)


def test_varlen_rows_are_the_documents(directory):
    dataset = DocumentDataset(directory, seq_len=T)
    whole = [tokens[: T + 1] for tokens in documents(directory) if len(tokens) > 1]
    assert dataset.samples_per_epoch == len(whole)
    chosen = np.array([3, 1, 4, 100])
    batch = dataset.micro_batch(chosen)
    assert predictions(batch) == [(whole[i][:-1], whole[i][1:]) for i in chosen]
    assert batch["input_ids"].shape == (1, sum(len(whole[i]) - 1 for i in chosen))
    assert np.unique(batch["document_ids"]).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("packing", ["best_fit", "varlen"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_counts_each_sample_once(directory, packing, world_size):
    dataset = open_dataset(directory, packing=packing, seq_len=T, split="validation")
    found = []
    for rank in range(world_size):
        for batch in validation_batches(dataset, micro_batch_size=3, rank=rank, world_size=world_size):
            found += predictions(batch)
    everything = dataset.micro_batch(np.arange(dataset.samples_per_epoch))
    assert sorted(found) == sorted(predictions(everything))


@pytest.mark.parametrize("packing", ["best_fit", "varlen"])
def test_the_model_sees_each_document_alone(directory, packing):
    """The loss of packed rows is that of their pieces one by one: neither position nor neighbours matter."""
    from gptoss_dist.model.config import ModelConfig
    from gptoss_dist.model.init import initialize
    from gptoss_dist.model.transformer import GptOss
    from tests.support.reference import SIZES

    model = GptOss(ModelConfig(**SIZES | {"vocab_size": 265, "sliding_window": 8}))
    initialize(model, 0)
    for parameter in model.parameters():
        parameter.data *= 3  # what a new model says hardly depends on the context
    dataset = open_dataset(directory, packing=packing, seq_len=T)
    with BatchLoader(dataset, micro_batch_size=12) as loader, torch.no_grad():
        (batch,) = next(loader)
        packed = model(batch["input_ids"], batch["labels"], document_ids_BT=batch["document_ids"]).token_loss
        alone = sum(
            model(torch.tensor([inputs]), torch.tensor([labels])).token_loss for inputs, labels in predictions(batch)
        )
    assert packed.item() == pytest.approx(alone.item(), rel=1e-6)
    together = model(batch["input_ids"], batch["labels"]).token_loss
    assert abs(together.item() - alone.item()) > 1e-4 * alone.item()


@pytest.mark.heavy
def test_a_document_of_more_than_31_bits_is_cut_like_any_other():
    def opened(kind):
        dataset = object.__new__(kind)
        dataset.seq_len, dataset._shards = T, [SimpleNamespace(lengths=np.array([long, 50]))]
        return dataset, dataset._count_samples()

    long, T = 2**31 + 10, 1 << 20
    dataset, samples = opened(DocumentDataset)
    assert samples == 2 and dataset._lengths.tolist() == [T, 49]
    dataset, samples = opened(BestFitDataset)
    assert samples == 2049
    starts, lengths, counts = dataset.spans(np.arange(samples))
    assert starts.tolist() == [*(i * T for i in range(2048)), long, 2048 * T, -1]
    assert lengths.tolist() == [T] * 2048 + [49, 9, T - 58] and counts.tolist() == [1] * 2048 + [3]


def test_unknown_packing(directory):
    with pytest.raises(ValueError, match="packing 'tight' is unknown; choose one of contiguous, best_fit, varlen"):
        open_dataset(directory, packing="tight", seq_len=T)


def test_the_example_of_best_fit():
    """The table at the top of best_fit.py."""
    plan = BestFit(np.array([3, 6, 4, 2, 5]), 10)
    pieces, lengths, counts = plan.rows(np.arange(len(plan)))
    assert lengths.tolist() == [6, 4, 5, 3, 2] and counts.tolist() == [2, 3] and pieces.tolist() == [1, 2, 4, 0, 3]


def test_the_example_of_reading(tmp_path):
    """The table at the top of reading.py; documents of 7 tokens fill rows of their own, those of 1 have no inputs."""
    first_file = [7, 1, 1, 1, 4, 7, 7, 7, 1, 1, 1, 1, 1, 2]  # those of 4 and 2 tokens begin at 10 and 40
    folder = write_dataset(tmp_path, {"train": [*first_file, *[1] * len(first_file)], "validation": [2, 2]})
    dataset = open_dataset(folder, packing="best_fit", seq_len=6)
    (table,) = tables_of(reading.__doc__)

    documents, padding = table["span"][:2], table["span"][2]
    starts, lengths = zip(*(map(int, re.findall(r"\d+", cell)) for cell in documents))
    spans = dataset.spans(np.arange(dataset.samples_per_epoch))
    row = int(np.flatnonzero(spans.counts_N == 3)[0])
    of_row = dataset.spans(np.array([row]))
    assert of_row.starts_P.tolist() == [*starts, -1]
    assert of_row.lengths_P.tolist() == [*lengths, *integers(re.findall(r"\d+", padding))]

    (plan,) = dataset.read_plans(np.array([row]), [1])
    bytes_each = dataset.files[0].dtype.itemsize
    read = [(position // bytes_each, end - first) for _, position, first, end in plan.reads_R4.tolist()]
    assert [f"tokens {start} to {start + count - 1}" for start, count in read] == table["read"][:2]
    assert table["read"][2] == "nothing"
    ranges = re.findall(r"\d+ to \d+", reading.__doc__.partition("    span")[0])
    assert [f"tokens {found}" for found in ranges] == table["read"][:2]

    batch = dataset.micro_batch(np.array([row]))
    tokens = dataset.files[0].read(0, 42)
    assert tokens[[13, 41]].tolist() == [dataset.eot_id] * 2

    def value(word):
        return dataset.eot_id if word == "E" else int(tokens[int(word[1:])]) if word[0] == "t" else int(word)

    for name, array in batch.items():
        assert [[value(word) for word in " ".join(table[name]).split()]] == array.tolist(), name
