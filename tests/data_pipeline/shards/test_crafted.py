"""Datasets and tokenizers that somebody crafted are refused in one line, and no pipe is waited for."""

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest

from data_pipeline import Manifest, Tokenizer
from data_pipeline.shards.checksums import problems
from data_pipeline.shards.manifest import open_shards
from tests.support.crafted import WRONG, changed, is_one_line, keys, text
from tests.support.token_data import write_dataset


@pytest.fixture
def dataset(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    return write_dataset(tmp_path / "data", {"train": [5, 6, 7], "validation": [4, 4]})


def look(dataset: Path) -> None:
    manifest = Manifest.read(dataset)
    for split in manifest.splits:
        open_shards(dataset, manifest, split)
    for problem in problems(dataset, manifest, report=lambda line: None):
        raise ValueError(problem)


def resealed(values: dict) -> dict:
    """Return a manifest with the hash of what it says now, as far as it says something."""
    try:
        shards = {name: [shard["sha256"] for shard in split["shards"]] for name, split in values["splits"].items()}
        content = [values["tokenizer"]["sha256"], values["tokenizer"]["eot_id"], values["dtype"], shards]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    except (KeyError, TypeError, AttributeError, IndexError):
        return values
    return values | {"content_sha256": digest}


@pytest.mark.parametrize("kind", WRONG)
def test_every_value_of_a_manifest(dataset, kind):
    path = dataset / "manifest.json"
    values = json.loads(path.read_text())
    harmless = {("python_version", "text"), ("storage", "gone")}
    for place in keys(values):
        if (place[-1], kind) not in harmless and place != ("content_sha256",):
            path.write_text(text(resealed(changed(values, place, kind))))
            with pytest.raises(ValueError) as error:
                look(dataset)
            assert is_one_line(str(error.value), "manifest.json", str(dataset)), (place, error.value)


@pytest.mark.parametrize("kind", WRONG)
def test_every_value_of_a_tokenizer(dataset, kind):
    path = dataset / "tokenizer.gptoss.json"
    values = json.loads(path.read_text())
    for place in keys(values):
        if (place, kind) != (("name",), "text"):
            path.write_text(text(changed(values, place, kind)))
            with pytest.raises(ValueError) as error:
                Tokenizer.load(dataset)
            assert is_one_line(str(error.value), "tokenizer.gptoss.json", str(dataset)), (place, error.value)


@pytest.mark.parametrize(
    "name", ["manifest.json", "tokenizer.gptoss.json", "tokenizer.tiktoken", "train-00000.bin", "train-00000.idx"]
)
def test_no_pipe_is_waited_for(dataset, name):
    (dataset / name).unlink()
    os.mkfifo(dataset / name)
    said = []

    def read():
        with pytest.raises(ValueError) as error:
            look(dataset)
        said.append(str(error.value))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(60)
    assert said and name in said[0] and "is a pipe" in said[0]
