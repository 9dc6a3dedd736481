"""Samples and batches: the same global batch on any number of ranks, exact resume, and clear refusals."""

import gc
import json
import threading

import numpy as np
import pytest
import torch

from data_pipeline import BatchLoader, TokenDataset, load_tokenizer, open_source, validation_batches
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.shards.manifest import Manifest

SEQ_LEN = 32


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "data"
    sources = [open_source("synthetic:documents=30")]
    tokenizer = load_tokenizer("bytes")
    prepare(sources, path, tokenizer, validation_fraction=0.3, shard_tokens=1500, report=lambda _: None)
    return path


@pytest.fixture
def dataset(directory):
    return TokenDataset(directory, seq_len=SEQ_LEN, seed=1)


def flat_tokens(directory, split="train"):
    shards = Manifest.read(directory).splits[split]
    assert len(shards) > 3
    return np.concatenate([np.fromfile(directory / f"{shard.name}.bin", "<u2") for shard in shards]).astype(np.int64)


def test_samples_are_windows_of_all_shards_as_one(directory, dataset):
    flat = flat_tokens(directory)
    assert dataset.tokens_total == len(flat) and dataset.samples_per_epoch == (len(flat) - 1) // SEQ_LEN
    expected = np.stack([flat[i * SEQ_LEN : i * SEQ_LEN + SEQ_LEN + 1] for i in range(dataset.samples_per_epoch)])
    assert np.array_equal(dataset.read(np.arange(dataset.samples_per_epoch)), expected)
    # Longer than a shard: a sample spans several files.
    long = TokenDataset(directory, seq_len=len(flat) - 1, shuffle=False)
    assert long.samples_per_epoch == 1 and np.array_equal(long.samples(np.array([0, 1])), np.stack([flat, flat]))
    # Each token but the first is predicted once, also where T divides the number of tokens.
    assert TokenDataset(directory, seq_len=1).samples_per_epoch == len(flat) - 1
    with pytest.raises(ValueError, match="too few"):
        TokenDataset(directory, seq_len=len(flat))


def test_every_epoch_has_each_sample_once_in_another_order(dataset):
    n = dataset.samples_per_epoch
    first, second = dataset.samples(np.arange(n)), dataset.samples(np.arange(n, 2 * n))
    in_order = dataset.read(np.arange(n))
    assert not np.array_equal(first, second) and not np.array_equal(first, in_order)
    for epoch in (first, second):
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, in_order.tolist()))
    other_seed = TokenDataset(dataset.path, seq_len=SEQ_LEN, seed=2)
    assert not np.array_equal(other_seed.samples(np.arange(n)), first)


def steps(dataset, count, **options):
    with BatchLoader(dataset, **options) as loader:
        return [next(loader) for _ in range(count)]


def rows(step):
    return torch.cat([torch.cat([batch["input_ids"], batch["labels"][:, -1:]], 1) for batch in step])


def test_any_number_of_ranks_reads_the_same_global_batch(dataset):
    # 8 rows a step, beyond one epoch. 2 and 4 ranks take interleaved runs, so the order within the step may differ but
    # the micro-batches of all ranks together are the same rows.
    n_steps = 2 * dataset.samples_per_epoch // 8 + 2
    alone = steps(dataset, n_steps, micro_batch_size=2, accumulation=4)
    for world_size, accumulation in ((2, 2), (4, 1)):
        layout = {"micro_batch_size": 2, "accumulation": accumulation, "world_size": world_size}
        per_rank = [steps(dataset, n_steps, rank=rank, **layout) for rank in range(world_size)]
        for step in range(n_steps):
            # Micro-batch m of rank r is run m * world_size + r.
            interleaved = [per_rank[r][step][m] for m in range(accumulation) for r in range(world_size)]
            assert torch.equal(rows(interleaved), rows(alone[step]))


def test_resume_continues_exactly_in_an_epoch_and_at_its_edge(dataset):
    n = dataset.samples_per_epoch
    layout = {"micro_batch_size": 2, "accumulation": 2}
    for start in (12, n - 4, n, n + 3):
        whole = steps(dataset, 3, samples_consumed=start, **layout)
        expected = torch.from_numpy(dataset.samples(start + np.arange(12)))
        assert torch.equal(torch.cat([rows(step) for step in whole]), expected)
        resumed = steps(dataset, 2, samples_consumed=start + 4, **layout)
        assert all(torch.equal(rows(a), rows(b)) for a, b in zip(whole[1:], resumed, strict=True))
    # Onto another number of ranks, with the same rows a step.
    halves = [steps(dataset, 1, micro_batch_size=2, rank=r, world_size=2, samples_consumed=n) for r in range(2)]
    assert torch.equal(rows(halves[0][0] + halves[1][0]), rows(steps(dataset, 1, samples_consumed=n, **layout)[0]))


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_samples_consumed_counts_what_was_handed_out(dataset, prefetch):
    with BatchLoader(dataset, micro_batch_size=3, accumulation=2, world_size=2, rank=1, prefetch=prefetch) as loader:
        assert loader.samples_consumed == 0
        for step in range(1, 4):
            next(loader)
            assert loader.samples_consumed == 12 * step
    with pytest.raises(StopIteration):
        next(loader)


def test_batches_are_contiguous_int64_and_labels_are_shifted(dataset):
    (batch, *_), *_ = steps(dataset, 1, micro_batch_size=2)
    assert set(batch) == {"input_ids", "labels"}
    for tensor in batch.values():
        assert tensor.shape == (2, SEQ_LEN) and tensor.dtype == torch.int64 and tensor.is_contiguous()
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])


def test_document_ids_and_labels_at_document_ends(dataset):
    plain = steps(dataset, 20, micro_batch_size=4)
    masked = steps(dataset, 20, micro_batch_size=4, document_mask=True)
    ends_seen = 0
    for (before,), (after,) in zip(plain, masked, strict=True):
        assert torch.equal(before["input_ids"], after["input_ids"])
        for row in range(4):
            inputs, labels = before["input_ids"][row].tolist(), before["labels"][row].tolist()
            document, documents = 0, []
            for t, token in enumerate(inputs):
                documents.append(document)
                if token == dataset.eot_id:
                    document += 1
                    labels[t] = -100
                    ends_seen += 1
            assert after["document_ids"][row].tolist() == documents
            assert after["labels"][row].tolist() == labels
            assert dataset.eot_id not in inputs[:-1] or documents[-1] > 0
    assert ends_seen > 3


@pytest.mark.parametrize(("world_size", "micro_batch_size", "max_samples"), [(1, 3, None), (2, 4, None), (4, 3, 17)])
def test_validation_covers_each_sample_once_and_keeps_ranks_in_step(
    directory, world_size, micro_batch_size, max_samples
):
    dataset = TokenDataset(directory, seq_len=SEQ_LEN, split="validation")
    count = min(dataset.samples_per_epoch, max_samples or 10**9)
    layout = {"micro_batch_size": micro_batch_size, "world_size": world_size, "max_samples": max_samples}
    per_rank = [list(validation_batches(dataset, rank=rank, **layout)) for rank in range(world_size)]
    assert {len(batches) for batches in per_rank} == {-(-count // (micro_batch_size * world_size))}
    real = []
    for batches in per_rank:
        for batch in batches:
            assert batch["input_ids"].shape == (micro_batch_size, SEQ_LEN)
            padding = (batch["labels"] == -100).all(1)
            assert not (batch["labels"][~padding] == -100).any()
            real += rows([{name: tensor[~padding] for name, tensor in batch.items()}]).tolist()
    spread = np.arange(count) * dataset.samples_per_epoch // count
    assert sorted(real) == sorted(dataset.read(spread).tolist())


def test_errors_of_the_thread_reach_the_caller_and_the_thread_ends(dataset, monkeypatch):
    broken = TokenDataset(dataset.path, seq_len=SEQ_LEN)
    good, calls = broken.fill, []

    def fill(*arguments):
        calls.append(arguments)
        if len(calls) > 2:
            raise OSError("disk on fire")
        return good(*arguments)

    monkeypatch.setattr(broken, "fill", fill)
    loader = BatchLoader(broken, micro_batch_size=2)
    next(loader), next(loader)
    for _ in range(2):
        with pytest.raises(OSError, match="disk on fire"):
            next(loader)
    assert loader.samples_consumed == 4
    loader.close()

    def threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith("data-prefetch")]

    closed, dropped = BatchLoader(dataset, micro_batch_size=2), BatchLoader(dataset, micro_batch_size=2)
    next(closed), next(dropped)
    assert len(threads()) == 2
    closed.close()
    closed.close()
    del dropped
    gc.collect()
    for thread in threads():
        thread.join(timeout=5)
    assert not threads()


def test_the_tokenizer_comes_with_the_data(directory, dataset, tmp_path):
    assert dataset.n_vocab == 265 == dataset.tokenizer.n_vocab
    assert dataset.tokenizer.decode(dataset.read(np.array([0]))[0][:7]).startswith("Note ")
    assert len(dataset.manifest_sha256) == 64


# --- refusals -----------------------------------------------------------------------------------


@pytest.fixture
def copy(directory, tmp_path):
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit(directory, change):
    path = directory / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "manifest.json").unlink(), "not a prepared dataset.*data_pipeline.prepare"),
        (
            lambda d: (d / "manifest.json").write_bytes((d / "manifest.json").read_bytes()[:200]),
            "manifest.json: truncated",
        ),
        (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json: damaged manifest"),
        (lambda d: edit(d, lambda m: m.pop("dtype")), "manifest.json: damaged manifest: dtype is missing"),
        (lambda d: edit(d, lambda m: m.update(version=2)), "manifest.json: damaged manifest: format .* version 2"),
        (lambda d: edit(d, lambda m: m["splits"]["train"].update(tokens=1)), "the totals of a split"),
        (lambda d: edit(d, lambda m: m["splits"]["train"]["shards"][0].update(sha256="0")), "content_sha256"),
        (lambda d: edit(d, lambda m: m["splits"]["train"]["shards"].pop(0)), "manifest.json: damaged"),
        (lambda d: (d / "train-00001.bin").unlink(), "train-00001.bin: cannot be opened"),
        (lambda d: (d / "train-00001.idx").unlink(), "train-00001.idx: cannot be opened"),
        (lambda d: (d / "train-00001.bin").write_bytes(b"123"), "train-00001.bin: truncated"),
        (lambda d: (d / "train-00001.idx").write_bytes(b"MMIDIDX"), "train-00001.idx: truncated"),
        (lambda d: swap(d, "train-00000", "train-00001"), "train-00000.idx: holds .* where manifest.json lists"),
    ],
)
def test_a_damaged_dataset_is_one_clear_line(copy, damage, message):
    TokenDataset(copy, seq_len=SEQ_LEN)
    damage(copy)
    with pytest.raises(ValueError, match=message) as error:
        TokenDataset(copy, seq_len=SEQ_LEN)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def swap(directory, a, b):
    for suffix in (".bin", ".idx"):
        one, other = directory / f"{a}{suffix}", directory / f"{b}{suffix}"
        one_bytes, other_bytes = one.read_bytes(), other.read_bytes()
        one.write_bytes(other_bytes)
        other.write_bytes(one_bytes)


def test_a_foreign_tokenizer_is_refused(copy):
    load_tokenizer("builtin").save(copy)
    with pytest.raises(ValueError, match="not the one that made its tokens"):
        _ = TokenDataset(copy, seq_len=SEQ_LEN).tokenizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 10**6}, "too few for one sample of seq_len \\+ 1 = 1000001"),
        ({"seq_len": 0}, "seq_len 0"),
        ({"seq_len": 8, "split": "test"}, "no split 'test', only train, validation"),
    ],
)
def test_impossible_datasets(directory, options, message):
    with pytest.raises(ValueError, match=message):
        TokenDataset(directory, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch_size": 0},
        {"accumulation": 0},
        {"rank": 2, "world_size": 2},
        {"samples_consumed": -1},
        {"prefetch": -1},
        {"workers": -1},
    ],
)
def test_impossible_loaders(dataset, options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name} {value}: must"):
        BatchLoader(dataset, **({"micro_batch_size": 2} | options))
