"""Preparing: complete or absent, the same bytes for any number of workers, nothing in both splits."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline import IndexedReader, Manifest, TokenDataset, load_tokenizer, open_source
from data_pipeline.prepare import main, prepare


def run(*arguments, capsys=None):
    code = main([str(argument) for argument in arguments])
    return code if capsys is None else (code, *capsys.readouterr())


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


def documents_of(directory, split):
    tokenizer, texts = load_tokenizer(directory), []
    for shard in Manifest.read(directory).splits[split]:
        reader = IndexedReader(Path(directory) / shard.name)
        for i in range(len(reader)):
            assert reader[i][-1] == tokenizer.eot_id and (reader[i][:-1] != tokenizer.eot_id).all()
            texts.append(tokenizer.decode(reader[i][:-1].astype("int64")))
    return texts


@pytest.fixture
def corpus(tmp_path):
    """400 documents of which some are equal, empty, broken or long."""
    texts = list(open_source("synthetic:documents=400").documents())
    texts += [texts[3], texts[7], "", "lone \ud800 surrogate", "<|endoftext|>", "long " * 5000]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_every_text_is_in_exactly_one_split_and_survives(tmp_path, corpus, capsys):
    code, out, _ = run(corpus, "--output", tmp_path / "data", "--validation-fraction", 0.25, capsys=capsys)
    assert code == 0 and "dropped 1 empty, 2 duplicate; 1 repaired" in out and "vocab_size >= 4105" in out
    train, validation = documents_of(tmp_path / "data", "train"), documents_of(tmp_path / "data", "validation")
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    expected = [text.replace("\ud800", "\ufffd") for text in dict.fromkeys(texts) if text]
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(expected)
    assert train == [text for text in expected if text in set(train)], "the order of the source is kept"
    assert 0.15 < len(validation) / len(expected) < 0.35

    # The split is decided by the text alone: a reordered corpus with more in it puts each text where it was.
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(reversed(corpus.read_text().splitlines(keepends=True))) + json.dumps({"text": "new"}) + "\n"
    )
    assert run(other, "--output", tmp_path / "other", "--validation-fraction", 0.25) == 0
    assert set(validation) <= set(documents_of(tmp_path / "other", "validation")) <= {*validation, "new"}


def test_workers_change_nothing(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("data_pipeline.prepare._BATCH_CHARACTERS", 9000)  # many more batches than are read ahead
    for name, workers in (("one", 1), ("two", 2)):
        options = ("--shard-tokens", 9000, "--tokenizer", "builtin", "--workers", workers)
        assert run(corpus, "synthetic:documents=100,seed=9", "--output", tmp_path / name, *options) == 0
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == two and len(one) > 20
    manifest = json.loads(one["manifest.json"])
    shards = manifest["splits"]["train"]["shards"]
    assert all(shard["tokens"] <= 9000 or shard["documents"] == 1 for shard in shards)
    assert manifest["tokenizer"]["eot_id"] == 4097 and manifest["dtype"] == "uint16" and manifest["version"] == 1


def test_a_second_request_is_recognised_or_refused(tmp_path, corpus, capsys):
    output = tmp_path / "data"
    base = (corpus, "--output", output, "--tokenizer", "bytes")
    assert run(*base) == 0
    before = contents(output)
    capsys.readouterr()
    code, out, _ = run(*base, capsys=capsys)
    assert code == 0 and "already prepared" in out

    for different, key in (
        (("--tokenizer", "builtin"), "tokenizer_sha256"),
        (("--validation-fraction", "0.5"), "validation_fraction"),
        (("--max-documents", "5"), "max_documents"),
    ):
        code, _, err = run(*base, *different, capsys=capsys)
        assert code == 1 and key in err and "--overwrite" in err and err.count("\n") == 1
    assert contents(output) == before

    assert run(*base, "--max-documents", 5, "--overwrite") == 0
    assert Manifest.read(output).documents("train") + Manifest.read(output).documents("validation") == 5
    shutil.copy(output / "train-00000.idx", tmp_path / "kept")
    (output / "train-00000.bin").write_bytes(b"")
    code, _, err = run(*base, "--max-documents", 5, capsys=capsys)
    assert code == 1 and "damaged" in err and "train-00000.bin" in err
    assert run(*base, "--max-documents", 5, "--overwrite") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "data", "kept"], "nothing left behind"


def test_a_directory_of_something_else_is_never_replaced(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    code, _, err = run("synthetic", "--output", tmp_path / "mine", "--overwrite", capsys=capsys)
    assert code == 1 and "not a prepared dataset" in err
    assert contents(tmp_path / "mine") == {"thesis.txt": b"x"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./missing.txt"], "no such file"),
        (["synthetic", "--tokenizer", "nonsense"], "neither a known name"),
        (["synthetic", "--validation-fraction", "1"], "validation_fraction 1.0"),
        (["synthetic", "--workers", "0"], "workers 0"),
        (["synthetic:documents=0"], "no training text"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys, arguments, message):
    code, _, err = run(*arguments, "--output", tmp_path / "data", capsys=capsys)
    assert code == 1 and message in err and err.count("\n") == 1 and err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_breaks_half_way_leaves_nothing(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 3 + "{broken\n")
    for workers in (1, 2):
        code, _, err = run(tmp_path / "a.jsonl", "--output", tmp_path / "data", "--workers", workers, capsys=capsys)
        assert code == 1 and "a.jsonl, line 4: not valid JSON" in err
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_unwritable_output_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    code, _, err = run("synthetic", "--output", tmp_path / "file/data", capsys=capsys)
    assert code == 1 and str(tmp_path / "file") in err and err.count("\n") == 1
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        code, _, err = run("synthetic", "--output", tmp_path / "closed/data", capsys=capsys)
        assert code == 1 and "Permission denied" in err


def test_what_a_killed_run_left_is_swept_but_not_a_running_one(tmp_path):
    import fcntl

    stale, running = tmp_path / "data.tmp-dead", tmp_path / "data.tmp-alive"
    stale.mkdir()
    running.mkdir()
    (stale / "train-00000.bin").write_bytes(b"half")
    descriptor = os.open(running, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    prepare([open_source("synthetic:documents=20")], tmp_path / "data", load_tokenizer("bytes"), report=lambda _: None)
    os.close(descriptor)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "data.tmp-alive"]


def test_a_killed_worker_is_an_error_not_a_hang(tmp_path):
    script = f"""
import multiprocessing, os, signal, sys
from data_pipeline import load_tokenizer
from data_pipeline.prepare import prepare
from data_pipeline.sources import Source

def texts():
    for i in range(200):
        yield f"{{i}} " * 100_000
        if i == 12:  # more than is read ahead, so the workers are at work
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)

if __name__ == "__main__":
    source = Source("x", "synthetic", "x", "x", texts)
    try:
        prepare([source], {str(tmp_path / "data")!r}, load_tokenizer("bytes"), workers=2)
    except ValueError as error:
        sys.exit(str(error))
"""
    path = tmp_path / "script.py"
    path.write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "a tokenizing process died" in result.stderr.splitlines()[-1], result.stderr
    assert not (tmp_path / "data").exists()


def test_the_default_corpus_is_ready_for_training(tmp_path):
    assert run("pystdlib", "--output", tmp_path / "data") == 0
    train = TokenDataset(tmp_path / "data", seq_len=512)
    validation = TokenDataset(tmp_path / "data", seq_len=512, split="validation")
    assert train.tokens_total > 2_000_000 and train.samples_per_epoch > 4000 and validation.samples_per_epoch >= 1
    assert not list(tmp_path.glob("*.tmp-*"))
