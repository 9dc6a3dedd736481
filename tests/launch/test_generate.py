"""`launch/generate.py` on a model trained for two steps."""

import re
import subprocess

import pytest
import yaml

from tests.support.ranks import MODEL, command, environment, run

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    root = tmp_path_factory.mktemp("generate")
    values = {
        "run": {"name": "tiny", "dir": str(root / "tiny")},
        "model": MODEL,
        "data": {"path": str(corpus), "seq_len": 32},
        "train": {"steps": 2, "micro_batch_size": 2, "precision": "fp32"},
        "validation": {"every": 0},
        "tracking": {"mlflow": False, "plots": False, "report": False},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(values))
    run("launch/train.py", "--config", str(root / "run.yaml"))
    return root / "tiny"


def test_prompts_and_seeds(folder):
    options = ["--checkpoint", str(folder), "--prompt", "ab", "--max-new-tokens", "20"]
    first = run("launch/generate.py", *options, "--seed", "1").stdout
    assert first.startswith("ab") and len(first) > 3
    assert run("launch/generate.py", *options, "--seed", "1").stdout == first
    assert run("launch/generate.py", *options, "--seed", "2").stdout != first


def test_samples_stops_and_log_probabilities(folder):
    options = ["--checkpoint", str(folder), "--prompt", "ab", "--prompt", "abab", "--max-new-tokens", "20"]
    out = run("launch/generate.py", *options, "--samples", "2", "--logprobs").stdout
    blocks = out.split("--- ")[1:]
    assert [block.splitlines()[0] for block in blocks] == ["1 of 2", "2 of 2"] * 2
    counts = []
    for block in blocks:
        ids = [int(token) for token in re.findall(r"^ +(\d+) +-\d+\.\d{4}  ['\"]", block, re.MULTILINE)]
        # Ids without a token, and those that end a text (<|endoftext|>, <|return|> and <|call|>), are not among them.
        assert all(0 <= token < 265 for token in ids) and not {257, 258, 264} & set(ids)
        counts.append(len(ids))
    assert min(counts) > 0 and max(counts) <= 20
    assert blocks[0].split(maxsplit=3)[3:] != blocks[1].split(maxsplit=3)[3:]
    greedy = ["--checkpoint", str(folder), "--prompt", "ab", "--temperature", "0", "--max-new-tokens", "20"]
    text = run("launch/generate.py", *greedy).stdout.removeprefix("ab").removesuffix("\n")
    stop = next(c for c in text if c.isascii() and c.isalpha() and c not in "abcdefx")  # not of an escape such as \\x0a
    stopped = run("launch/generate.py", *greedy, f"--stop={stop}").stdout
    assert stopped == "ab" + text[: text.index(stop)] + "\n"


def test_interactive(folder):
    lines = ":t 0\n:n 5\n:k 3\n:p 0.9\n:x\nab\n:t warm\n:q\n"
    done = subprocess.run(
        command("launch/generate.py", "--checkpoint", str(folder)),
        input=lines,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    for expected in ("temperature = 0.0", "max_new_tokens = 5", "top_k = 3", "top_p = 0.9", ":q quit", "could not"):
        assert expected in done.stdout
    assert "Traceback" not in done.stderr


def test_mistakes(folder, tmp_path):
    done = run("launch/generate.py", "--checkpoint", str(tmp_path), "--prompt", "x", expect=2)
    assert "no complete checkpoint" in done.stderr and "Traceback" not in done.stderr
    done = run("launch/generate.py", "--checkpoint", str(folder), "--prompt", "x", "--top-p", "0", expect=2)
    assert "top_p" in done.stderr
    done = run("launch/generate.py", "--checkpoint", str(folder), "--samples", "2", expect=2)
    assert "--samples and --logprobs" in done.stderr and "Traceback" not in done.stderr
