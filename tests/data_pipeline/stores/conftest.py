"""A local S3 server for all tests of this folder, and a corpus of every kind of file."""

import gzip
import json

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline import open_source
from tests.support.bucket import environment, s3_server


@pytest.fixture(scope="session")
def server():
    """The port of an S3 server."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with s3_server() as port:
        yield port


@pytest.fixture
def connect(monkeypatch):
    """Point the environment at an S3 server on some port; pauses between tries are short."""

    def connect(port: int) -> None:
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # they have the environment of their first use
        for name, value in environment(port).items():
            monkeypatch.setenv(name, value)

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # boto's pauses cannot be shortened
    monkeypatch.setattr("data_pipeline.stores.attempts._FIRST_PAUSE", 0.01)
    monkeypatch.setattr("data_pipeline.stores.attempts._LONGEST_PAUSE", 0.02)
    return connect


@pytest.fixture
def small_parts(monkeypatch):
    """Cut files into parts of some kilobytes, and ask for as little at once."""
    monkeypatch.setattr("data_pipeline.corpora.part.MIN_PART_BYTES", 20_000)
    monkeypatch.setattr("data_pipeline.stores.reader._MOST_BYTES", 8000)
    monkeypatch.setattr("data_pipeline.stores.reader._LEAST_BYTES", 2000)


@pytest.fixture(scope="session")
def texts():
    return list(open_source("synthetic:documents=300,seed=3").documents())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts):
    """A folder of files of every kind, some of which are left out."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)]
    (folder / "deep/er").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "a.jsonl").write_text("".join(lines[:100]))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress("".join(lines[80:200]).encode()))
    (folder / "deep/c.json.gz").write_bytes(gzip.compress("".join(lines[140:150]).encode()))
    table = pyarrow.table({"id": range(100), "text": texts[150:250]})
    pyarrow.parquet.write_table(table, folder / "deep/d.parquet", row_group_size=9, compression="none")
    for index in range(250, 260):
        (folder / f"deep/er/{index} \u00fc.txt").write_text(texts[index])
    (folder / "README.md").write_text("a card")
    (folder / ".git/x.jsonl").write_text("no text")
    (folder / "e.csv").write_text("no text")
    return folder


@pytest.fixture(scope="session")
def objects(corpus):
    """The same by the names that objects have."""
    files = [path for path in corpus.rglob("*") if path.is_file()]
    return {path.relative_to(corpus).as_posix(): path.read_bytes() for path in files}
