"""Hugging Face datasets on disk: texts and token ids are read by `prepare`, token ids adopted as they are."""

import json
import shutil

import datasets
import numpy as np
import pytest

from data_pipeline import Manifest, load_tokenizer
from data_pipeline.corpora.sources import open_source
from data_pipeline.disk import staging_directory
from data_pipeline.prepare.__main__ import main as prepare
from data_pipeline.shards.manifest import open_shards
from data_pipeline.tools.adopt import main as adopt
from data_pipeline.tools.verify import main as verify

END = 257
ROWS = [[65, 66, END], [67], [], [68, END, 69, 70], [END], [65, 66]]
DOCUMENTS = [[65, 66, END], [67, END], [68, END], [69, 70, END], [65, 66, END]]


def run(tool, *arguments):
    return tool([str(argument) for argument in arguments])


def documents(directory, split="train"):
    readers = open_shards(directory, Manifest.read(directory), split)
    return [reader[i].tolist() for reader in readers for i in range(len(reader))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    texts = {"train": [f"text {i}" for i in range(20)], "test": ["held out"]}
    of_texts = {name: datasets.Dataset.from_dict({"text": values}) for name, values in texts.items()}
    datasets.DatasetDict(of_texts).save_to_disk(folder / "texts")
    of_texts["train"].save_to_disk(folder / "one", num_shards=2)
    ids = datasets.Dataset.from_dict({"input_ids": ROWS, "attention_mask": [[1]] * len(ROWS)})
    datasets.DatasetDict({"train": ids, "test": ids.select([0])}).save_to_disk(folder / "ids")
    ids.to_parquet(folder / "ids.parquet")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_texts_of_a_saved_dataset(folder):
    expected = [f"text {i}" for i in range(20)]
    assert list(open_source(str(folder / "texts")).documents()) == expected
    assert list(open_source(str(folder / "texts"), split="test").documents()) == ["held out"]
    one = open_source(str(folder / "one"))
    assert list(one.documents()) == expected and len(one.parts) == 2
    before = one.fingerprint
    (folder / "one/data-00000-of-00002.arrow").touch()
    assert open_source(str(folder / "one")).fingerprint != before


@pytest.mark.parametrize(
    ("name", "split", "change", "message"),
    [
        ("texts", "tset", {}, "no split 'tset', only 'train', 'test'; choose one with --split"),
        ("texts", None, {"splits": ["../.."]}, r"no split 'train', only '\.\./\.\.'"),
        ("texts", "..", {"splits": [".."]}, "no split"),
        ("texts", None, {"splits": 3}, "dataset_dict.json: splits=3 must be `array`.*save the dataset again"),
        ("one", "train", {}, "is one split, without a name, not 'train'; leave out --split"),
        ("one", None, {"_data_files": [{"filename": "../texts/x"}]}, "is no name of a file in this folder; state.json"),
        (
            "one",
            None,
            {"_data_files": [{"filename": "x.arrow"}]},
            "x.arrow cannot be read: No such file .*; state.json",
        ),
        ("one", None, {"_data_files": []}, "state.json: lists no files"),
        ("one", None, {"_data_files": 3}, "state.json: _data_files=3 must be"),
        ("one", None, [], "state.json: .*must be `object`"),
    ],
)
def test_a_damaged_saved_dataset_is_one_line(folder, name, split, change, message):
    path = folder / name / ("dataset_dict.json" if name == "texts" else "state.json")
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | change if isinstance(change, dict) else change))
    with pytest.raises(ValueError, match=message) as error:
        open_source(str(folder / name), split=split)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["ids", "ids/train", "ids.parquet"])
def test_prepare_takes_token_ids_as_they_are(folder, source, capsys):
    options = ("--tokenizer", "bytes", "--output", folder / "out", "--ids-column", "input_ids")
    assert run(prepare, folder / source, *options, "--validation-fraction", 0) == 0
    assert documents(folder / "out") == DOCUMENTS[:4] and run(verify, folder / "out") == 0
    assert Manifest.read(folder / "out").dropped == {"empty": 2, "duplicate": 1}
    # The same text falls on the same side, be it read as text or as ids.
    texts = [load_tokenizer("bytes").decode(ids[:-1]) for ids in DOCUMENTS]
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    both = []
    for name, arguments in (("a", (folder / source, *options[4:])), ("b", (folder / "t.jsonl",))):
        common = ("--tokenizer", "bytes", "--output", folder / name, "--validation-fraction", 0.3)
        assert run(prepare, *arguments, *common) == 0
        both.append((documents(folder / name), documents(folder / name, "validation")))
    assert both[0] == both[1] and both[0][1]


def test_prepare_refuses_ids_of_another_tokenizer(folder, capsys):
    bad = datasets.Dataset.from_dict({"input_ids": [[1], [2, 265]]})
    bad.save_to_disk(folder / "bad")
    capsys.readouterr()  # a progress bar
    options = ("--tokenizer", "bytes", "--output", folder / "out", "--ids-column", "input_ids")
    assert run(prepare, folder / "bad", *options) == 2
    err = capsys.readouterr().err
    assert "arrow, record 2: token id 265 is not one of the 265 ids of tokenizer bytes" in err and err.count("\n") == 1
    assert run(adopt, folder / "bad", "--tokenizer", "bytes", "--train", "*.arrow") == 2
    err = capsys.readouterr().err
    assert ".arrow, row 2: token id 265 is not one of" in err and "--tokenizer that made these ids" in err
    assert sorted(path.suffix for path in (folder / "bad").iterdir()) == [".arrow", ".json", ".json"]


def test_adopt_copies_the_ids_beside_the_tables(folder, capsys):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(adopt, folder / "ids", "--tokenizer", "bytes", "--train", "train", "--validation", "test") == 0
    assert documents(folder / "ids") == DOCUMENTS and documents(folder / "ids", "validation") == DOCUMENTS[:1]
    assert run(verify, folder / "ids") == 0 and run(adopt, folder, "--tokenizer", "bytes", "--train", "*.parquet") == 0
    assert documents(folder) == DOCUMENTS
    assert all(path.read_bytes() == content for path, content in before.items())
    names = {path.name for path in (folder / "ids").iterdir()}
    shards = {f"{split}-00000.{suffix}" for split in ("train", "validation") for suffix in ("bin", "idx")}
    files = {"manifest.json", "tokenizer.gptoss.json", "tokenizer.tiktoken", "verified.json"}
    assert names == {"train", "test", "dataset_dict.json", *shards, *files}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "*.arrow", "--dtype", "uint16"], "--dtype uint16: is about raw files, and these are tables"),
        (["--train", "*.arrow", "raw.bin"], "raw.bin: no table where others are; adopt them apart"),
        (["--train", "raw.bin", "--dtype", "uint16", "--ids-column", "x"], "--ids-column x: is about tables"),
        (["--train", "*.arrow", "--ids-column", "x"], "no column 'x', only 'input_ids', 'attention_mask'; choose one"),
        (["--train", "*.arrow", "--ids-column", "text"], "no column 'text'"),
        (["--train", "nowhere"], "nowhere: matches no file"),
        (["--train", "a**"], "'a**': is no pattern of names in"),
    ],
)
def test_what_cannot_be_adopted_leaves_nothing(folder, capsys, arguments, message):
    np.arange(9, dtype="u2").tofile(folder / "ids/train/raw.bin")
    before = sorted(folder.rglob("*"))
    assert run(adopt, folder / "ids/train", "--tokenizer", "bytes", *arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and sorted(folder.rglob("*")) == before


def test_a_file_in_the_way_of_a_shard_stays(folder, capsys):
    place = folder / "ids/train/train-00000.idx"
    place.write_text("mine")
    options = (folder / "ids/train", "--tokenizer", "bytes", "--train", "*.arrow")
    assert run(adopt, *options) == 2 and "train-00000.idx: is in the way of a shard" in capsys.readouterr().err
    assert place.read_text() == "mine" and not place.with_suffix(".bin").exists()
    place.unlink()
    assert run(adopt, *options) == 0
    (folder / "ids/train/manifest.json").unlink()
    assert run(adopt, *options) == 0, "what an adoption that was killed left is the same"


def test_of_two_adoptions_of_one_folder_the_second_is_refused(folder, capsys):
    before = sorted(folder.rglob("*"))
    for place, pattern in ((folder / "ids", "train"), (folder / "ids/train", "*.arrow")):
        options = (place, "--tokenizer", "bytes", "--train", pattern)
        with staging_directory(place / "adopted"):  # as the first does
            assert run(adopt, *options) == 2
        err = capsys.readouterr().err
        assert err == f"error: {place}: another process is adopting these files; wait until it has ended\n"
        assert sorted(folder.rglob("*")) == before
        assert run(adopt, *options) == 0
        before = sorted(folder.rglob("*"))
