"""The examples do what their first paragraphs say. One tiny run serves them all."""

import re
import sys
from pathlib import Path

import pytest

from data_pipeline import Manifest
from tests.support.ranks import ROOT, losses, run

STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What train_tiny.py leaves: `data/tiny` and `runs/tiny`."""
    folder = tmp_path_factory.mktemp("examples")
    done = run("examples/train_tiny.py", "--steps", str(STEPS), cwd=folder)
    assert re.search(r"loss 5\.\d+ -> [12]\.\d+ in 40 steps", done.stdout), done.stdout
    return folder


@pytest.mark.distributed
def test_train_tiny(folder):
    assert sorted(losses(folder / "runs/tiny")) == list(range(1, STEPS + 1))
    assert list((folder / "runs/tiny/samples").iterdir())


@pytest.mark.distributed
def test_load_in_transformers(folder):
    done = run("examples/load_in_transformers.py", cwd=folder)
    difference = float(re.search(r"difference of the logits: (\S+)", done.stdout)[1])
    assert difference < 1e-4 and "\nThe " in done.stdout


@pytest.mark.distributed
def test_resume_on_another_layout(folder):
    run("examples/resume_on_another_layout.py", "--steps", str(STEPS + 10), cwd=folder, processes=2)
    found = losses(folder / "runs/tiny")
    assert sorted(found) == list(range(1, STEPS + 11))
    assert found[STEPS + 10] < 0.6 * found[1]
    assert "expert_parallel: 2" in (folder / "runs/tiny/config.yaml").read_text()


@pytest.mark.distributed
def test_train_by_hand(folder):
    done = run("examples/train_by_hand.py", "--steps", "40", cwd=folder)
    first, *_, last = (float(loss) for loss in re.findall(r"loss (\S+)", done.stdout))
    assert first > 5 and last < 3.5


def test_filter_for_prepare(tmp_path, monkeypatch):
    from data_pipeline.prepare.__main__ import main

    monkeypatch.setattr(sys, "path", [*sys.path])  # the module is found where it is allowed
    (tmp_path / "plain.txt").write_text("words  \nand more\n")
    (tmp_path / "generated.txt").write_text("# DO NOT EDIT\n")
    (tmp_path / "table.txt").write_text("1" * 2000)
    output, name = tmp_path / "out", "filter_for_prepare:keep"
    options = ["--tokenizer", "bytes", "--validation-fraction", "0", "--filter", name]
    options += ["--allow-code", str(ROOT / "examples/filter_for_prepare.py")]
    assert main([str(tmp_path), "--output", str(output), *options]) == 0
    manifest = Manifest.read(output)
    assert manifest.dropped[name] == 2 and manifest.documents("train") == 1
    assert manifest.tokens("train") == len("words\nand more\n") + 1
