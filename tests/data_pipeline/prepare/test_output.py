"""The folder that `prepare` writes: what is there already is recognised, refused or replaced, and never lost."""

import os
import shutil

import numpy as np
import pytest

from data_pipeline import Manifest
from data_pipeline.ownership import owned
from data_pipeline.prepare.dedupe import assemble_splits
from data_pipeline.tools import adopt, split
from tests.support.prepared import contents, run


def test_a_second_request_is_recognised_or_refused(tmp_path, corpus, capsys):
    output = tmp_path / "data"
    base = (corpus, "--output", output, "--tokenizer", "bytes")
    assert run(*base) == 0
    before = contents(output)
    capsys.readouterr()
    code, out, _ = run(*base, capsys=capsys)
    assert code == 0 and "already prepared" in out

    for different, key in (
        (("--tokenizer", "builtin"), "(another tokenizer)"),
        (("--validation-fraction", "0.5"), "(validation_fraction 0.01, not 0.5)"),
        (("--max-documents", "5"), "(max_documents None, not 5)"),
    ):
        code, _, err = run(*base, *different, capsys=capsys)
        assert code == 2 and key in err and "--overwrite" in err and err.count("\n") == 1
    code, _, err = run("synthetic", *base[1:], capsys=capsys)
    assert code == 2 and "(other sources)" in err
    assert contents(output) == before

    assert run(*base, "--max-documents", 5, "--overwrite") == 0
    assert Manifest.read(output).documents("train") + Manifest.read(output).documents("validation") == 5
    shutil.copy(output / "train-00000.idx", tmp_path / "kept")
    (output / "train-00000.bin").write_bytes(b"")
    code, _, err = run(*base, "--max-documents", 5, capsys=capsys)
    assert code == 2 and "damaged" in err and "train-00000.bin" in err
    assert run(*base, "--max-documents", 5, "--overwrite") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "data", "kept"], "nothing left behind"


@pytest.mark.parametrize("kind", ["texts", "an application", "adopted", "split"])
def test_a_directory_of_something_else_is_never_replaced(tmp_path, capsys, kind):
    mine = tmp_path / "mine"
    if kind == "split":
        assert run("synthetic:documents=20", "--output", tmp_path / "whole") == 0
        assert split.main([str(tmp_path / "whole"), f"--output={mine}", "--validation-fraction=0.5"]) == 0
    else:
        mine.mkdir()
        (mine / "thesis.txt").write_text("x")
    if kind == "an application":
        (mine / "manifest.json").write_text('{"name": "of the web"}')
    if kind == "adopted":
        np.arange(500, dtype=np.uint16).tofile(mine / "train.bin")
        np.arange(500, dtype=np.uint16).tofile(mine / "val.bin")
        words = "--tokenizer builtin --dtype uint16 --train train.bin --validation val.bin"
        assert adopt.main([str(mine), *words.split()]) == 0
    before = contents(mine)
    code, _, err = run("synthetic", "--output", mine, "--overwrite", capsys=capsys)
    assert code == 2 and "not a dataset that prepare made" in err and contents(mine) == before


def test_unwritable_output_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    code, _, err = run("synthetic", "--output", tmp_path / "file/data", capsys=capsys)
    assert code == 2 and str(tmp_path / "file") in err and err.count("\n") == 1
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        code, _, err = run("synthetic", "--output", tmp_path / "closed/data", capsys=capsys)
        assert code == 2 and "Permission denied" in err


def test_only_one_process_prepares_a_dataset(tmp_path, capsys):
    (tmp_path / "data.preparing").mkdir()
    with owned(tmp_path / "data.preparing"):
        (tmp_path / "data.preparing/unfinished.txt").touch()
        (tmp_path / "data.preparing/begun").touch()
        code, _, err = run("synthetic:documents=20", "--output", tmp_path / "data", capsys=capsys)
        assert (tmp_path / "data.preparing/begun").exists(), "the other's work is left alone"
        assert code == 2 and "another process is preparing this dataset (process" in err and err.count("\n") == 1
    (tmp_path / "data.preparing/unfinished.txt").unlink()
    code, _, err = run("synthetic:documents=20", "--output", tmp_path / "data", capsys=capsys)
    assert code == 2 and "data.preparing: is needed for unfinished work, but holds something else" in err
    (tmp_path / "data.preparing/begun").unlink()
    assert run("synthetic:documents=20", "--output", tmp_path / "data") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_replacing_loses_nothing_at_any_moment(tmp_path, capsys, monkeypatch):
    """A kill between the two renames, and what other people put in the way."""
    old, new, output = "synthetic:documents=20", "synthetic:documents=30", tmp_path / "data"
    assert run(old, "--output", output) == 0
    before = contents(output)
    (tmp_path / "data.replaced-2023").mkdir()
    (tmp_path / "data.tmp-mine").mkdir()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("data_pipeline.prepare.workdir.publish", killed)
    assert run(new, "--output", output, "--overwrite") == 130 and not output.exists()
    monkeypatch.undo()
    # Whatever is asked for next, the old dataset is back, and the new one's parts are kept.
    code, _, err = run("synthetic:documents=0", "--output", output, "--overwrite", capsys=capsys)
    assert code == 2 and "no training text" in err and contents(output) == before
    code, out, _ = run(new, "--output", output, "--overwrite", capsys=capsys)
    assert code == 0 and "continuing: 1 of 1 parts" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "data.replaced-2023", "data.tmp-mine"]

    # Damage that sizes do not show is repaired when it is asked for.
    whole = contents(output)
    (output / "train-00000.bin").write_bytes(bytes(len(whole["train-00000.bin"])))
    assert run(new, "--output", output, "--overwrite") == 0 and contents(output) == whole

    # Something that appears meanwhile is not replaced.
    def appear(*arguments):
        (tmp_path / "late").mkdir()
        (tmp_path / "late/notes.txt").write_text("x")
        return assemble_splits(*arguments)

    monkeypatch.setattr("data_pipeline.prepare.pipeline.assemble_splits", appear)
    code, _, err = run(old, "--output", tmp_path / "late", "--overwrite", capsys=capsys)
    assert code == 2 and "not a dataset that prepare made" in err and contents(tmp_path / "late") == {"notes.txt": b"x"}


def test_the_umask_decides_the_modes(tmp_path):
    before = os.umask(0o027)
    try:
        assert run("synthetic:documents=20", "--output", tmp_path / "data") == 0
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "data").iterdir()}
    assert len(modes) > 5 and set(modes.values()) == {0o640} and (tmp_path / "data").stat().st_mode & 0o777 == 0o750
