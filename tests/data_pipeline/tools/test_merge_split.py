"""Datasets put together, divided, and looked into: no document lost, doubled or on both sides."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import Manifest, load_tokenizer, open_dataset
from data_pipeline.disk import staging_directory
from data_pipeline.prepare.__main__ import main as prepare
from data_pipeline.shards.manifest import open_shards
from data_pipeline.shards.megatron import IndexedWriter
from data_pipeline.tools import inspect, merge, split
from data_pipeline.tools.adopt import adopt
from data_pipeline.tools.verify import main as verify

SHARD_TOKENS = 3000


def run(tool, *arguments):
    return tool([str(argument) for argument in arguments])


def make(path, texts, *options):
    path.with_suffix(".jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    common = ("--tokenizer", "bytes", "--validation-fraction", 0.2, "--shard-tokens", SHARD_TOKENS)
    assert run(prepare, path.with_suffix(".jsonl"), "--output", path, *common, *options) == 0
    return path


def documents(directory, split="train"):
    manifest = Manifest.read(directory)
    readers = open_shards(directory, manifest, split)
    return [tuple(reader[i].tolist()) for reader in readers for i in range(len(reader))]


def both(directory):
    return documents(directory), documents(directory, "validation")


def left_behind(directory):
    return [path.name for path in directory.iterdir() if ".tmp-" in path.name]


WORDS = ["tokens", "of", "ünïcode", "and", "\N{GRINNING FACE}", "<|endoftext|>", "\n\n", "0123"]


def texts(seed, count):
    generator = np.random.default_rng(seed)
    return [f"{seed}.{i} " + " ".join(generator.choice(WORDS, generator.integers(1, 60))) for i in range(count)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return make(tmp_path_factory.mktemp("one") / "one", texts(1, 100))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return make(tmp_path_factory.mktemp("two") / "two", texts(2, 70))


@pytest.mark.parametrize("options", [[], ["--link"]])
def test_merged_is_one_after_the_other(tmp_path, one, two, options, capsys):
    before = {path: path.read_bytes() for folder in (one, two) for path in folder.iterdir()}
    assert run(merge.main, one, two, "--output", tmp_path / "out", *options) == 0
    for name in ("train", "validation"):
        assert documents(tmp_path / "out", name) == documents(one, name) + documents(two, name)
    assert run(verify, tmp_path / "out") == 0
    shards = Manifest.read(tmp_path / "out").splits["train"]
    assert [shard.name for shard in shards] == [f"train-{i:05d}" for i in range(len(shards))] and len(shards) > 5
    linked = os.path.samefile(tmp_path / "out/train-00000.bin", one / "train-00000.bin")
    assert linked == bool(options)
    assert all(path.read_bytes() == data for path, data in before.items()), "the inputs are as they were"
    capsys.readouterr()
    assert run(merge.main, one, two, "--output", tmp_path / "out") == 2
    assert "exists; choose another" in capsys.readouterr().err and not left_behind(tmp_path)


def test_of_two_that_write_one_dataset_the_second_is_refused(tmp_path, one, two, capsys):
    for number, arguments in enumerate(
        ((merge.main, one, two), (split.main, one, "--parts", 2), (split.main, one, "--validation-fraction", 0.1))
    ):
        output = tmp_path / str(number)
        with staging_directory(output):  # as the first does
            assert run(*arguments, "--output", output) == 2
        err = capsys.readouterr().err
        assert f"{output} is being written by another process; wait until it has ended" in err and err.count("\n") == 1
        assert list(tmp_path.glob(f"*{number}*")) == [] and not left_behind(tmp_path)
        assert run(*arguments, "--output", output) == 0


def test_what_another_process_has_finished_meanwhile_is_not_written_over(tmp_path, one, two, capsys, monkeypatch):
    @contextlib.contextmanager
    def after_another(output):
        (output / "its").mkdir(parents=True)
        with staging_directory(output) as staging:
            yield staging

    for module in (merge, split):
        monkeypatch.setattr(module, "staging_directory", after_another)
    for number, arguments in enumerate(
        ((merge.main, one, two), (split.main, one, "--parts", 2), (split.main, one, "--validation-fraction", 0.1))
    ):
        assert run(*arguments, "--output", tmp_path / str(number)) == 2
        assert f"{tmp_path / str(number)}: exists; choose another output directory\n" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / str(number)).iterdir()] == ["its"] and not left_behind(tmp_path)


def test_leaked_documents_are_counted_or_dropped(tmp_path, one, capsys):
    """Half of the documents of `one`, divided by another fraction: some train documents here are validation there."""
    other = make(tmp_path / "other", texts(1, 100)[:50] + texts(3, 30), "--validation-fraction", 0.6)
    held_out = set(both(one)[1]) | set(both(other)[1])
    leaked = [document for directory in (one, other) for document in documents(directory) if document in held_out]
    assert len(leaked) > 5
    assert run(merge.main, one, other, "--output", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert f"{len(leaked)} training documents are also in a validation split" in err and "--drop-leaked" in err
    assert err.count("\n") == 1 and not (tmp_path / "out").exists() and not left_behind(tmp_path)

    assert run(merge.main, one, other, "--output", tmp_path / "out", "--drop-leaked") == 0
    train, validation = both(tmp_path / "out")
    assert train == [document for path in (one, other) for document in documents(path) if document not in held_out]
    assert validation == documents(one, "validation") + documents(other, "validation")
    assert Manifest.read(tmp_path / "out").dropped["leaked"] == len(leaked) and run(verify, tmp_path / "out") == 0


@pytest.mark.parametrize("write", [lambda array: array.tobytes(), None])
def test_raw_datasets_merge_and_split_too(tmp_path, write, capsys):
    tokenizer = load_tokenizer("bytes")
    for name, seed in (("a", 5), ("b", 6)):
        (tmp_path / name).mkdir()
        for file, part in (("train.npy", texts(seed, 40)), ("val.npy", texts(seed + 10, 5) + texts(5, 3))):
            flat = [[*tokenizer.encode(text), tokenizer.eot_id] for text in part]
            tokens = np.concatenate(flat)[:-1].astype("u4")  # the last document lacks its end
            (tmp_path / name / file).write_bytes(write(tokens)) if write else np.save(tmp_path / name / file, tokens)
        options = {"train": ["train.npy"], "validation": ["val.npy"], "dtype": "uint32", "report": lambda _: None}
        adopt(tmp_path / name, tokenizer, **options)
    a, b = tmp_path / "a", tmp_path / "b"
    assert run(merge.main, a, b, "--output", tmp_path / "out") == 2
    assert "3 training documents are also in a validation" in capsys.readouterr().err
    assert run(merge.main, a, b, "--output", tmp_path / "out", "--drop-leaked") == 0
    assert documents(tmp_path / "out") == documents(a)[3:] + documents(b) and run(verify, tmp_path / "out") == 0
    assert Manifest.read(tmp_path / "out").storage == "raw"
    assert run(merge.main, tmp_path / "out", make(tmp_path / "other", texts(9, 9)), "--output", tmp_path / "no") == 2
    assert "its storage is megatron uint16 where that of" in capsys.readouterr().err

    assert run(split.main, tmp_path / "out", "--output", tmp_path / "again", "--validation-fraction", 0.3) == 0
    ended = {
        (*document, 257) if document[-1] != 257 else document
        for halves in both(tmp_path / "out")
        for document in halves
    }
    assert set().union(*both(tmp_path / "again")) == ended and run(verify, tmp_path / "again") == 0


def test_megatron_shards_without_documents_are_left_out(tmp_path, capsys):
    tokenizer, end = load_tokenizer("bytes"), 257
    for name, content in (("full", [65, 66, end]), ("empty", []), ("val", [67, end])):
        with IndexedWriter(tmp_path / name, np.dtype("<u2")) as writer:
            for document in [content] * bool(content):
                writer.add_document(np.array(document))
    adopt(tmp_path, tokenizer, train=["empty", "full"], validation=["val"], report=lambda _: None)
    assert run(merge.main, tmp_path, "--output", tmp_path / "out") == 0
    assert both(tmp_path / "out") == both(tmp_path) == ([(65, 66, end)], [(67, end)])
    assert [shard.name for shard in Manifest.read(tmp_path / "out").splits["train"]] == ["train-00000"]
    assert run(split.main, tmp_path, "--output", tmp_path / "parts", "--parts", 1) == 0
    assert both(tmp_path / "parts/part-00000") == both(tmp_path)


def test_what_does_not_fit_together_is_refused(tmp_path, one, two, capsys):
    for name, content in (("app", "{}"), (".trash", (one / "manifest.json").read_text()), ("bad", "x")):
        (one.parent / name).mkdir()  # beside a dataset
        (one.parent / name / "manifest.json").write_text(content)
    builtin = make(tmp_path / "builtin", texts(4, 30), "--tokenizer", "builtin")
    for directories, message in (
        ((one, builtin), "builtin: its tokenizer is builtin where that of"),
        ((one, one), "given twice"),
        ((one, tmp_path / "none"), "none: not a prepared dataset, there is no such directory; make one with `python"),
        (
            (one, one.with_name("onne")),
            f"onne: not a prepared dataset, there is no such directory; did you mean {one}?",
        ),
        (
            (one, one.with_suffix(".jsonl")),
            "one.jsonl: not a prepared dataset, it is a file; make one of it with `python",
        ),
        ((one, one.parent), f"not a prepared dataset itself, but {one} is one\n"),
    ):
        assert run(merge.main, *directories, "--output", tmp_path / "out") == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1 and "data_pipeline.adopt" not in err
    data = (builtin / "train-00000.bin").read_bytes()
    (builtin / "train-00000.bin").write_bytes(data[:-2] + b"\0\0")
    for arguments in (
        (merge.main, builtin, "--output", tmp_path / "out"),
        (split.main, builtin, "--output", tmp_path / "out", "--parts", 2),
    ):
        assert run(*arguments) == 2 and "train-00000.bin: content differs" in capsys.readouterr().err
    for arguments, message in (
        (("--parts", 2000), "2000 parts would not all get a document to train on"),
        (("--parts", len(documents(two))), "would not all get a document"),  # some are longer than a part
    ):
        assert run(split.main, two, "--output", tmp_path / "out", *arguments) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    for divide, arguments, message in (
        (split.split_by_hash, {"validation_fraction": 1.5}, "validation_fraction 1.5: must be"),
        (split.split_into_parts, {"parts": 0}, "parts 0: must be"),
        (split.split_into_parts, {"parts": 2, "shard_tokens": 0}, "shard_tokens 0: must be"),
    ):
        with pytest.raises(ValueError, match=message):
            divide(two, tmp_path / "out", **arguments)
        options = [f"--{name}={value}" for name, value in arguments.items()]
        assert run(split.main, two, "--output", tmp_path / "out", *options) == 2
        assert f"{options[-1][2:]} must be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not left_behind(tmp_path)


@pytest.mark.parametrize("tokenizer", ["bytes", "builtin"])
def test_divided_anew_by_the_rule_of_prepare(tmp_path, tokenizer):
    first = make(tmp_path / "first", texts(7, 150), "--tokenizer", tokenizer)
    direct = make(tmp_path / "direct", texts(7, 150), "--tokenizer", tokenizer, "--validation-fraction", 0.5)
    options = ("--validation-fraction", 0.5, "--shard-tokens", SHARD_TOKENS)
    assert run(split.main, first, "--output", tmp_path / "again", *options) == 0
    assert [set(half) for half in both(tmp_path / "again")] == [set(half) for half in both(direct)]
    assert sum(map(len, both(tmp_path / "again"))) == 150 and run(verify, tmp_path / "again") == 0
    shards = Manifest.read(tmp_path / "again").splits["train"]
    assert len(shards) > 1 and all(shard.tokens <= SHARD_TOKENS for shard in shards)


def test_parts_put_together_are_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.shards.writer._BATCH_TOKENS", 700)
    copies = [*texts(1, 100), *texts(1, 5), "\ud800 is half of a character"]
    one = make(tmp_path / "one", copies)
    assert run(split.main, one, "--output", tmp_path / "parts", "--parts", 4, "--shard-tokens", 1000) == 0
    parts = sorted((tmp_path / "parts").iterdir())
    assert [part.name for part in parts] == [f"part-{i:05d}" for i in range(4)]
    assert all(run(verify, part) == 0 for part in parts)
    for name in ("train", "validation"):
        assert [document for part in parts for document in documents(part, name)] == documents(one, name)
    sizes = [Manifest.read(part).tokens("train") for part in parts]
    assert max(sizes) - min(sizes) < 2 * max(map(len, documents(one)))
    assert run(merge.main, *parts, "--output", tmp_path / "again") == 0
    whole, again = Manifest.read(one), Manifest.read(tmp_path / "again")
    assert both(tmp_path / "again") == both(one) and again.sources == whole.sources
    assert again.dropped == whole.dropped == {"empty": 0, "duplicate": 5}
    assert again.irregular == whole.irregular == {"split": 0, "repaired": 1}


def test_inspect_prints_documents_and_samples_as_training_reads_them(one, capsys):
    manifest, tokenizer = Manifest.read(one), load_tokenizer(one)
    assert run(inspect.main, one) == 0
    out = capsys.readouterr().out
    assert f"train       {manifest.tokens('train'):,} tokens in" in out and "one.jsonl (files)" in out
    assert all(shard.name in out for shards in manifest.splits.values() for shard in shards)
    lengths = sorted(map(len, documents(one)))
    assert f"p0 {lengths[0]} " in out and f"p100 {lengths[-1]}" in out

    for name in ("train", "validation"):
        for number in (0, len(documents(one, name)) - 1):
            assert run(inspect.main, one, "--document", number, "--split", name) == 0
            title, text = capsys.readouterr().out.split("\n", 1)
            assert text == tokenizer.decode(documents(one, name)[number]) + "\n"
            assert title.startswith(f"document {number} of {name}: ")
    assert run(inspect.main, one, "--document", 100) == 2
    assert "document 100: " in capsys.readouterr().err

    train = documents(one)
    for packing in ("contiguous", "best_fit", "varlen"):
        dataset = open_dataset(one, packing=packing, seq_len=700, seed=3)
        for position in range(dataset.samples_per_epoch + 1):
            _, *lines = inspect.sample(one, "train", position, seq_len=700, seed=3, packing=packing)
            (batch,) = zip(*dataset.micro_batch(dataset.order(np.array([position]))).values())
            inputs, labels, seen, predicted = batch[0], batch[1], [], []
            while lines and not lines[0].startswith("--- padding"):
                title, text, *lines = lines
                number, first, last = map(int, re.search(r"document (\d+) .* tokens (\d+) to (\d+),", title).groups())
                assert text == tokenizer.decode(np.array(train[number][first : last + 1]))
                seen += train[number][first : last + 1]
                if packing != "contiguous":
                    predicted += seen[1 - len(train[number][first : last + 1]) :]
                    seen.pop()
            if lines:
                assert lines == [f"--- padding, {(labels < 0).sum()} tokens"] and packing == "best_fit"
                inputs, labels = inputs[labels >= 0], labels[labels >= 0]
            if packing == "contiguous":
                seen, predicted = seen[:-1], seen[1:]
            assert (seen, predicted) == (inputs.tolist(), labels.tolist())
    assert run(inspect.main, one, "--sample", 0, "--seq-len", 10**6) == 2
    assert "too few" in capsys.readouterr().err


def test_inspect_shows_packed_samples_and_mixtures(one, tmp_path, capsys):
    tokenizer, train = load_tokenizer(one), documents(one)
    texts = {tokenizer.decode(np.array(tokens)) for tokens in train}
    for packing in ("best_fit", "varlen"):
        seen = []
        for number in range(open_dataset(one, packing=packing, seq_len=4000).samples_per_epoch):
            options = {"seq_len": 4000, "seed": 3, "packing": packing}
            lines = list(inspect.sample(one, "train", number, **options))[1:]
            seen += [text for text in lines if not text.startswith("--- ")]
        assert sorted(seen) == sorted(texts)
    make(tmp_path / "b", WORDS * 9, "--keep-duplicates")
    capsys.readouterr()
    assert run(inspect.main, one, tmp_path / "b", "--weights", "3,1", "--at", 20000, "--seq-len", 64) == 0
    assert "15,000 samples, 960,000 tokens, 75.000% of them" in capsys.readouterr().out
    assert run(inspect.main, one, "--weights", "3,1") == 2
    assert "--weights: are those of a mixture" in capsys.readouterr().err
    for option, value in (
        ("--seed", 3),
        ("--seq-len", 7),
        ("--split", "validation"),
        ("--at", 5),
        ("--packing", "varlen"),
    ):
        assert run(inspect.main, one, option, value) == 2
        assert f"error: {option}: " in (err := capsys.readouterr().err) and "give " in err and err.count("\n") == 1
    assert run(inspect.main, one, "--sample", 10**20) == 2 and "sample=1" in capsys.readouterr().err
    for options in ((tmp_path / "b", "--sample", 3), (tmp_path / "b", "--document", 3), ("--packing", "varlen")):
        assert run(inspect.main, one, *options) == 2
        assert "give one directory" in (err := capsys.readouterr().err) or "give --sample N" in err
    assert run(inspect.main, one, tmp_path / "b", "--weights", 3) == 2
    assert "--weights: 1 of them for 2 datasets" in capsys.readouterr().err
    assert run(inspect.main, "--weights", "3;1", one, tmp_path / "b") == 2
    assert "'3;1': must be numbers separated by commas" in capsys.readouterr().err


def test_output_that_is_closed_early_is_no_error(one):
    command = f"{sys.executable} -m data_pipeline.inspect {one} --document 0 | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", command], cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "0\n" and not result.stderr


def test_a_split_that_holds_nothing_out_says_so(tmp_path, capfd):
    data = make(tmp_path / "few", ["a", "b"], "--validation-fraction", "0")
    capfd.readouterr()
    assert run(split.main, data, "--output", tmp_path / "again", "--validation-fraction", "0.001") == 0
    assert "no document fell into the validation split" in capfd.readouterr().out


COMMANDS = {
    "merge": lambda data: (merge.main, data),
    "parts": lambda data: (split.main, data, "--parts", 2),
    "fraction": lambda data: (split.main, data, "--validation-fraction", 0.1),
    "prepare": lambda data: (prepare, data.with_suffix(".jsonl"), "--tokenizer", "bytes"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_is_where_it_is_said_to_be_or_refused_before_the_work(tmp_path, one, command, capsys, monkeypatch):
    arguments = COMMANDS[command](one)
    (tmp_path / "disk/real").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/real")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for output, place in (("link", "disk/real"), ("~/m", "home/m"), (f"file://{tmp_path}/f", "f")):
        assert run(*arguments, "--output", output) == 0
        (dataset, *_) = [path.parent for path in sorted((tmp_path / place).rglob("manifest.json"))]
        assert documents(dataset) and run(verify, dataset) == 0
    assert (tmp_path / "link").is_symlink()

    (tmp_path / "mount").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "mount")
    before = sorted(tmp_path.rglob("*"))
    for module in (merge, split):
        monkeypatch.setattr(module, "check_content", lambda *_: pytest.fail("the work has begun"))
    capsys.readouterr()
    for output, message in (
        ("mount", f"error: {tmp_path}/mount: is a mount point, to which nothing can be renamed; choose a directory"),
        ("loop", f"error: {tmp_path}/loop: is a link that leads back to itself; choose another output\n"),
        ("s3://key:secret@bucket/x", "error: output s3://***@bucket/x: is a URL; name a place on a file system, and "),
    ):
        assert run(*arguments, "--output", output) == 2
        err = capsys.readouterr().err
        assert err.startswith(message) and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
