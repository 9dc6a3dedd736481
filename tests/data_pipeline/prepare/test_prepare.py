"""Preparing: complete or absent, the same bytes for any number of workers, nothing in both splits."""

import functools
import gzip
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline import Manifest, TokenDataset, load_tokenizer, open_source
from data_pipeline.command_line import parse
from data_pipeline.corpora.part import Part, TextSource
from data_pipeline.prepare.dedupe import find_duplicates
from data_pipeline.prepare.part import Preparation, PreparedPart, hashes_path, prepare_part, write_hashes
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.prepare.rules import Rules
from data_pipeline.prepare.settings import PrepareConfig
from data_pipeline.tools.verify import main as verify
from tests.support.prepared import contents, documents_of, run


def test_every_text_is_in_exactly_one_split_and_survives(tmp_path, corpus, capsys):
    code, out, _ = run(corpus, "--output", tmp_path / "data", "--validation-fraction", 0.25, capsys=capsys)
    assert code == 0 and "dropped 1 empty, 3 duplicate; 1 repaired" in out and "vocab_size >= 4105" in out
    train, validation = documents_of(tmp_path / "data", "train"), documents_of(tmp_path / "data", "validation")
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    expected = list(dict.fromkeys(text.replace("\ud800", "\ufffd") for text in texts if text))
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


@pytest.fixture
def corpora(tmp_path, corpus):
    """Sources of several parts each, with copies of documents within and across parts."""
    texts = list(open_source("synthetic:documents=300,seed=5").documents())
    folder = tmp_path / "corpora"
    folder.mkdir()
    for index in range(5):
        rows = texts[50 * index : 50 * index + 80] + [texts[index]] * 2 + [f"only in {index}"]
        (folder / f"{index}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    (folder / "z.txt.gz").write_bytes(gzip.compress(texts[7].encode()))
    (folder / "zz.md").write_text("the last one")
    return [folder, corpus, "synthetic:documents=40,seed=9"]


def expected_documents(sources, most=None):
    """What should be in a dataset, in order: the plain way."""
    texts = [text for source in sources for text in open_source(str(source)).documents() if text]
    return list(dict.fromkeys(text.replace("\ud800", "\ufffd") for text in texts))[:most]


@pytest.mark.heavy
@pytest.mark.parametrize("most", [None, 290])
def test_workers_change_nothing(tmp_path, corpora, monkeypatch, most):
    monkeypatch.setattr("data_pipeline.prepare.part.BATCH_CHARACTERS", 9000)
    monkeypatch.setattr("data_pipeline.corpora.part.MIN_PART_BYTES", 20_000)  # files are read in ranges of bytes
    options = ["--shard-tokens", 9000, "--tokenizer", "bytes", "--validation-fraction", 0.1]
    options += ["--max-documents", most] if most else []
    for workers in (1, 2, 4):
        assert run(*corpora, "--output", tmp_path / str(workers), *options, "--workers", workers) == 0
    one = contents(tmp_path / "1")
    assert one == contents(tmp_path / "2") == contents(tmp_path / "4") and len(one) > 20
    manifest = json.loads(one["manifest.json"])
    shards = manifest["splits"]["train"]["shards"]
    assert all(shard["tokens"] <= 9000 or shard["documents"] == 1 for shard in shards)
    assert sum(shard["source"].startswith("0.jsonl, bytes ") for shard in shards) >= 4
    assert manifest["tokenizer"]["eot_id"] == 257 and manifest["dtype"] == "uint16" and manifest["version"] == 1

    expected = expected_documents(corpora, most)
    for split in ("train", "validation"):
        found = documents_of(tmp_path / "1", split)
        assert found == [text for text in expected if text in set(found)], "in the order of the sources, once each"
    assert sorted(found + documents_of(tmp_path / "1", "train")) == sorted(expected)
    if most is None:
        records = [text for source in corpora for text in open_source(str(source)).documents()]
        assert manifest["dropped"] == {"empty": 1, "duplicate": len(records) - 1 - len(expected)}


def test_duplicates_are_found_in_ranges_of_hashes(tmp_path, monkeypatch):
    """However little memory the search may use, it finds what a dictionary finds."""
    random = np.random.default_rng(0)
    parts, first, expected = [], {}, {}
    for index, count in enumerate([50, 0, 1, 200, 120]):
        keys = [f"{value:03d}".encode() for value in random.permutation(300)[:count]]
        digests = [hashlib.sha256(key).digest()[:16] for key in keys]
        write_hashes(hashes_path(tmp_path, str(index)), digests)
        parts.append(PreparedPart(str(index), "", 0, count, {}, {}, {}, 0, [], {}))
        expected[index] = [place for place, digest in enumerate(digests) if first.setdefault(digest, index) != index]
    expected = {key: places for key, places in expected.items() if places}
    for documents_at_once in (1 << 20, 100, 1):
        found = find_duplicates(tmp_path, parts, documents_at_once=documents_at_once)
        assert {key: places.tolist() for key, places in found.items()} == expected


@pytest.mark.distributed
def test_killed_at_any_moment_it_continues_to_the_same_bytes(tmp_path):
    """KILLS=n for more of them."""
    random = Random(int(os.environ.get("SEED", 0)))
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(10):  # 10 parts of 0.1 s of work
        texts = list(open_source(f"synthetic:documents=500,seed={index}").documents()) + ["everywhere"] * 2
        (folder / f"{index}.jsonl").write_text("".join(json.dumps({"text": text * 3}) + "\n" for text in texts))
    command = [sys.executable, "-m", "data_pipeline.prepare", folder, "--shard-tokens", 200_000, "--output"]
    command = list(map(str, command))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    start = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole"), "--workers", "2"], env=environment, check=True)
    duration = time.monotonic() - start
    expected = contents(tmp_path / "whole")
    assert len(expected) > 20

    output, kills, completed, continued = tmp_path / "out", 0, 0, 0
    while kills < int(os.environ.get("KILLS", 4)) or not output.exists():
        if output.exists():
            assert contents(output) == expected
            shutil.rmtree(output)
            completed += 1
        workers = random.choice(["1", "2", "4"])
        # Not a pipe, the end of which would wait for all workers: the next command must work at once.
        with open(tmp_path / "log", "w+") as log:
            process = subprocess.Popen(
                [*command, str(output), "--workers", workers], env=environment, stdout=log, start_new_session=True
            )
            try:
                assert process.wait(timeout=random.uniform(0.3, 1.1) * duration) == 0
            except subprocess.TimeoutExpired:
                # Workers must end with their parent: sometimes only that one is killed.
                os.killpg(process.pid, signal.SIGKILL) if random.random() < 0.5 else process.kill()
                process.wait()
                kills += 1
        out = (tmp_path / "log").read_text()
        continued += "continuing" in out
        left = {path.name for path in tmp_path.iterdir()} - {"in", "whole", "out", "out.preparing", "log"}
        assert not left and not (output.exists() and contents(output) != expected)
    assert contents(output) == expected and continued > 0
    assert run(folder, "--shard-tokens", 200_000, "--output", output) == 0
    assert not (tmp_path / "out.preparing").exists()  # what a kill after the end may have left is swept
    print(f"{kills} kills, continued {continued} times, {completed + 1} times complete")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./missing.txt"], "no such file"),
        (["synthetic", "--tokenizer", "nonsense"], "neither a known name"),
        (["synthetic:documents=0"], "no training text in the sources, so nothing was prepared: 0 records read"),
        (["synthetic:documents=9", "--max-characters", "1"], "prepared: 9 records read, 9 long"),
        (["synthetic", "--min-characters", "9", "--max-characters", "8"], "--min-characters 9: must not be more than"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys, arguments, message):
    code, _, err = run(*arguments, "--output", tmp_path / "data", capsys=capsys)
    assert code == 2 and message in err and err.count("\n") == 1 and err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_values_outside_their_range_are_refused_before_and_in_python(tmp_path, capsys):
    for option, key, value in (("--validation-fraction", "validation_fraction", 1.0), ("--workers", "workers", 0)):
        code, _, err = run("synthetic", "--output", tmp_path / "data", option, value, capsys=capsys)
        assert code == 2 and err.startswith(f"error: {key}={value} must be") and err.count("\n") == 1
        with pytest.raises(ValueError, match=f"{key} {value}: must be"):
            prepare([open_source("synthetic")], tmp_path / "data", load_tokenizer("bytes"), **{key: value})
    assert list(tmp_path.iterdir()) == []


def test_malformed_records_are_counted_named_and_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data_pipeline.corpora.part.MIN_PART_BYTES", 900)
    lines = [json.dumps({"text": f"document {i}"}) for i in range(100)]
    lines[41], lines[70], lines[71] = "{broken", '{"content": "x"}', '{"text": 3}'
    path, output = tmp_path / "a.jsonl", tmp_path / "data"
    path.write_text("\n".join(lines) + "\n")
    for workers in (1, 2):
        code, _, err = run(path, "--output", output, "--workers", workers, capsys=capsys)
        assert code == 2 and err.count("\n") == 1 and "3 of 100 records are malformed, more than" in err
        for part in (
            f"a.jsonl, byte {len(''.join(lines[:41])) + 41}: not valid JSON",
            f"byte {len(''.join(lines[:70])) + 70}: no column 'text', only 'content'",
            "column 'text' holds int",
        ):
            assert part in err
        assert not output.exists()
    # What was done is kept: only the limit changed.
    code, out, _ = run(path, "--output", output, "--max-malformed", 0.05, capsys=capsys)
    assert code == 0 and "continuing" in out and "3 of 100 records are malformed and left out" in out
    assert Manifest.read(output).dropped["malformed"] == 3 and "dropped 3 malformed" in out
    assert (output / "malformed.log").read_text().count("\n") == 3 and not (tmp_path / "data.preparing").exists()
    texts = documents_of(output, "train") + documents_of(output, "validation")
    assert sorted(texts) == sorted(f"document {i}" for i in range(100) if i not in (41, 70, 71))

    # A wrong column is not bad luck.
    monkeypatch.undo()
    path.write_text("\n".join(lines * 3) + "\n")
    code, _, err = run(path, "--output", tmp_path / "c", "--text-column", "txt", "--max-malformed", 1, capsys=capsys)
    assert code == 2 and "no column 'txt', only 'text'" in err and "the first 100 records" in err


@pytest.mark.heavy
@pytest.mark.parametrize("most", [None, 10])
def test_a_file_that_is_named_twice(tmp_path, corpus, most):
    """Its second copy is all duplicates, and the first one stays; what is read in parts is read once."""
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(8)))
    options = ["--validation-fraction", 0.1, *(["--max-documents", most] if most else [])]
    assert run(other, corpus, "--output", tmp_path / "once", *options) == 0
    once = [documents_of(tmp_path / "once", split) for split in ("train", "validation")]
    for workers in (1, 2):
        output = tmp_path / f"twice{workers}"
        assert run(other, corpus, other, tmp_path / "*.jsonl", "--output", output, *options, "--workers", workers) == 0
        assert [documents_of(output, split) for split in ("train", "validation")] == once
    if not most:
        read = len(list(open_source(str(corpus)).documents())) + 8
        dropped = [Manifest.read(tmp_path / name).dropped for name in ("once", "twice1")]
        assert dropped[1]["duplicate"] + dropped[1]["empty"] == dropped[0]["duplicate"] + dropped[0]["empty"] + read + 8

    options = ["--keep-duplicates", "--validation-fraction", 0.5]
    assert run(other, other, "--output", tmp_path / "kept", *options, "--workers", 2) == 0
    kept = documents_of(tmp_path / "kept", "train") + documents_of(tmp_path / "kept", "validation")
    assert sorted(kept) == sorted(2 * [f"document {i}" for i in range(8)])
    assert verify([str(tmp_path / "kept")]) == 0


def keep_even(text):
    return len(text) % 2 == 0


def shout(text):
    return text.upper()


def forgets_to_return(text):
    pass


def test_filters_and_normalization(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    path, output = tmp_path / "a.jsonl", tmp_path / "data"
    texts = ["e\u0301!", "odd", "even", "four words are fine", "x" * 50, "ab"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--normalization", "NFC", "--min-characters", 2, "--max-characters", 20, "--validation-fraction", 0]
    filters = ["--filter", "test_prepare:keep_even", "--filter", "test_prepare:shout", "--allow-code", __file__]
    for workers in (1, 2):
        assert run(path, "--output", output, *options, *filters, "--workers", workers, "--overwrite") == 0
        assert documents_of(output, "train") == ["\u00c9!", "EVEN", "AB"]
    dropped = {"empty": 0, "duplicate": 0, "long": 1, "test_prepare:keep_even": 2}
    assert Manifest.read(output).dropped == dropped
    for bad, message in (
        ("nonsense", "expected MODULE:FUNCTION"),
        ("test_prepare:nothing", "has no attribute 'nothing'"),
        ("test_prepare:forgets_to_return", "returned None, on a text that begins 'e"),
    ):
        code, _, err = run(path, "--output", tmp_path / "b", "--filter", bad, "--allow-code", __file__, capsys=capsys)
        assert code == 2 and message in err and err.count("\n") == 1


def test_recipes(tmp_path, corpus, capsys):
    recipe = tmp_path / "recipe.yaml"
    values = f"sources: [{corpus}]\ntokenizer: bytes\nvalidation-fraction: 0.5\nshard_tokens: 5000\n"
    recipe.write_text(values)
    assert run("--config", recipe, "--output", tmp_path / "a", "--shard-tokens", 9000) == 0
    options = ("--tokenizer", "bytes", "--validation-fraction", 0.5, "--shard-tokens", 9000)
    assert run(corpus, "--output", tmp_path / "b", *options) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for line, message in (
        ("tokeniser: bytes", "'tokeniser' is not accepted"),
        ("workers: many", "workers=many must be a whole number or null"),
        ("normalization: NFX", "normalization=NFX must be one of NFC, NFD, NFKC, NFKD or null"),
        ("sources: x", "sources=x must be a list"),
        ("a: [", "is not readable YAML"),
    ):
        recipe.write_text(line + "\n")
        code, _, err = run("--config", recipe, "--output", tmp_path / "c", capsys=capsys)
        assert code == 2 and message in err and "recipe.yaml" in err and err.count("\n") == 1
    for path in (Path(__file__).parents[3] / "configs/data").rglob("*.yaml"):
        assert parse(PrepareConfig, ["--config", str(path), "--output", "x"], prog="prepare").sources


@pytest.mark.heavy
def test_parquet_in_row_groups_and_shards_of_a_huggingface_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.corpora.part.MIN_PART_BYTES", 2000)
    texts = list(open_source("synthetic:documents=120").documents())
    folder = tmp_path / "Stories/data"
    folder.mkdir(parents=True)
    for index in range(3):
        table = pyarrow.table({"text": texts[40 * index : 40 * index + 40]})
        pyarrow.parquet.write_table(table, folder / f"train-{index:05d}-of-00003.parquet", row_group_size=7)
    files, hub = open_source(str(folder)), open_source(str(tmp_path / "Stories"), split="train")
    assert len(files.parts) > 9 and len(hub.parts) == 3
    assert "row groups 0 to" in files.parts[0].name
    with pytest.raises(ValueError, match=r"^source '[^']*' cannot be opened as .* 'test': ValueError: Bad split"):
        open_source(str(tmp_path / "Stories"), split="test")
    for name, arguments in (("files", [folder]), ("hub", [tmp_path / "Stories", "--split", "train"])):
        options = ("--tokenizer", "bytes", "--validation-fraction", 0, "--workers", 2)
        assert run(*arguments, "--output", tmp_path / name, *options) == 0
        assert documents_of(tmp_path / name, "train") == texts


def test_files_behind_a_url(tmp_path, corpora):
    """A server that knows no ranges of bytes, as http.server."""
    folder = corpora[0]
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        names = sorted(path.name for path in folder.iterdir())
        options = ("--tokenizer", "bytes", "--workers", 2)
        assert run(*(f"{base}/{name}" for name in names), "--output", tmp_path / "remote", *options) == 0
        assert run(*(folder / name for name in names), "--output", tmp_path / "local", *options) == 0
        server.shutdown()
    remote, local = (Manifest.read(tmp_path / name) for name in ("remote", "local"))
    assert remote.content_sha256 == local.content_sha256


def test_the_fast_engine_writes_the_same_bytes(tmp_path, corpus):
    pytest.importorskip("gigatoken")
    texts = [" " * 1_100_000 + "end", "x\ud800y", "\r\n \n\t" * 50, "<|endoftext|>", "\u4e2d\u6587" * 99, "1234567 89"]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for engine in ("tiktoken", "gigatoken"):
        options = ("--output", tmp_path / engine, "--engine", engine, "--max-documents", 500)
        assert run(path, corpus, "pystdlib", *options) == 0
    assert contents(tmp_path / "tiktoken") == contents(tmp_path / "gigatoken")


def test_inputs_and_filters_that_change_are_noticed(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / f"in/{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "my_filter.py").write_text("def f(text):\n    return text + '1'\n")
    options = ("--output", tmp_path / "data", "--validation-fraction", 0, "--filter", "my_filter:f")
    options += ("--allow-code", tmp_path / "my_filter.py")
    rules = Rules(filters=("my_filter:f",))
    (tmp_path / "my_filter.py").write_text("def f(text):\n    return text + '2'\n")
    source = open_source(str(tmp_path / "in"))
    with pytest.raises(ValueError, match="my_filter:f: was changed"):
        prepare_part(source.parts[0], "0" * 32, Preparation(tmp_path, rules, load_tokenizer("bytes")))
    (tmp_path / "in/b.jsonl").write_text(json.dumps({"text": "changed"}) + "\n")
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"b\.jsonl: was changed since it was found, or is another file on"):
            prepare([source], tmp_path / "data", load_tokenizer("bytes"), workers=workers)
        assert not (tmp_path / "data").exists()
    (tmp_path / "in/b.jsonl").write_text(json.dumps({"text": "b"}) + "\n")
    del sys.modules["my_filter"]
    assert run(tmp_path / "in", *options) == 0 and documents_of(tmp_path / "data", "train") == ["a2", "b2"]
    del sys.modules["my_filter"]
    (tmp_path / "my_filter.py").write_text("def f(text):\n    return len(3)\n")
    code, _, err = run(tmp_path / "in", *options, "--overwrite", capsys=capsys)
    assert code == 2 and "filter my_filter:f: TypeError" in err and "begins 'a'" in err and err.count("\n") == 1


def read_and_die(parent):
    for i in range(200):
        yield f"{i} " * 100_000
        if i == 12 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error_not_a_hang(tmp_path):
    parts = [Part(str(i), str(i), 0, functools.partial(read_and_die, os.getpid())) for i in range(3)]
    with pytest.raises(ValueError, match="a worker process died"):
        prepare([TextSource("x", "x", "x", parts)], tmp_path / "data", load_tokenizer("bytes"), workers=2)
    assert not (tmp_path / "data").exists()


def test_the_default_corpus_is_ready_for_training(tmp_path):
    assert run("pystdlib", "--output", tmp_path / "data") == 0
    train = TokenDataset(tmp_path / "data", seq_len=512)
    validation = TokenDataset(tmp_path / "data", seq_len=512, split="validation")
    assert train.tokens_total > 2_000_000 and train.samples_per_epoch > 4000 and validation.samples_per_epoch >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
