"""The commands of docs/passkey.md, from nothing to a model that retrieves a pass key at its training length."""

import json

import pytest

from tests.support.ranks import ROOT, run

WORDS = r" ?\p{L}+|\p{N}|[^\p{L}\p{N}]"


def module(name: str) -> str:
    """The file of a command that documents call by `python -m`."""
    return str(ROOT / (name.replace(".", "/") + ".py"))


@pytest.fixture
def prepared(tmp_path):
    """The data of the proof, in a folder where its commands run."""
    ranks = "data/passkey_tiny.tiktoken"
    run(
        module("data_pipeline.bpe"),
        *("needles:documents=1000", "--vocab-size", "512", "--pattern", WORDS, "--output", ranks),
        cwd=tmp_path,
    )
    for name in ("passkey_tiny_short", "passkey_tiny"):
        recipe = ROOT / f"configs/data/{name}.yaml"
        prepare = module("data_pipeline.prepare.__main__")
        run(prepare, "--config", str(recipe), "--output", f"data/{name}", cwd=tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.distributed
def test_a_tiny_model_learns_to_retrieve_within_minutes(prepared):
    options = ["--config", str(ROOT / "configs/passkey_tiny.yaml"), "--tracking.mlflow", "false"]
    run("launch/train.py", *options, cwd=prepared)
    run(
        "launch/evaluate.py",
        *("passkey", "--checkpoint", "runs/passkey_tiny", "--lengths", "256", "1024"),
        *("--yarn", "none", "auto", "--original-length", "264", "--no-mlflow", "--output", "result"),
        processes=2,
        cwd=prepared,
    )
    found = json.loads((prepared / "result/result.json").read_text())
    accuracy = {(row["yarn"], row["tokens"]): row["accuracy"] for row in found["rows"]}
    assert accuracy["none", 256] >= 0.95, accuracy
    # At its own length there is nothing to scale.
    assert accuracy["auto", 256] == accuracy["none", 256], accuracy
