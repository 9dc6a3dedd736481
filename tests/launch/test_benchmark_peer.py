"""The benchmark beside datatrove: no time counts before the tokens are the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline import load_tokenizer
from launch.benchmarks import peer

SCRIPT = Path(peer.__file__).parents[1] / "benchmark_data.py"


def turns(name, tokens=10, digest="a"):
    return {name: [{"tokens": tokens, "digest": digest, "seconds": 2.0}]}


def test_different_tokens_are_no_comparison():
    peer._check_same(turns("datatrove") | turns("tiktoken") | turns("tiktoken-defaults", 9, "b"))
    for other in (turns("tiktoken", 11), turns("gigatoken", digest="b")):
        with pytest.raises(SystemExit, match="made different tokens, so their times mean nothing"):
            peer._check_same(turns("datatrove") | other)


def test_an_interpreter_without_datatrove_is_one_line(tmp_path):
    command = [sys.executable, SCRIPT, "peer", "--peer-python", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1
    assert f"--peer-python {tmp_path / 'none'}: has no datatrove" in done.stderr and "extra `peers`" in done.stderr


def test_the_corpus_has_no_special_tokens_and_two_halves(tmp_path, monkeypatch):
    texts = ["<|endoftext|> is a token", *(f"text {i}" for i in range(100))]
    source = type("Source", (), {"documents": lambda self: iter(texts)})
    monkeypatch.setattr("data_pipeline.open_source", lambda name: source())
    size, documents = peer.make_files(tmp_path / "corpus", 1, "bytes")
    read = [
        [json.loads(line)["text"] for line in (tmp_path / f"corpus/{i}.jsonl").read_text().splitlines()] for i in (0, 1)
    ]
    assert len(read[0]) + len(read[1]) == documents == len({*read[0], *read[1]}) and size >= 1 << 20
    assert abs(len(read[0]) - len(read[1])) < documents / 10
    specials = load_tokenizer("bytes").special_tokens
    assert not any(special in text for text in read[0] + read[1] for special in specials)


@pytest.mark.slow
def test_datatrove_makes_the_same_tokens():
    pytest.importorskip("datatrove")
    command = [sys.executable, SCRIPT, "peer", "--megabytes", "1", "--rounds", "1", "--tokenizer", "builtin"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "the same ids from all" in done.stdout and "this project, tiktoken, against datatrove: " in done.stdout
