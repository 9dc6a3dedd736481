"""Megatron's file layout, read here with nothing but `struct`, and every way it can be broken."""

import errno
import os
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data_pipeline.shards import token_files
from data_pipeline.shards.megatron import IndexedReader, IndexedWriter, token_dtype
from data_pipeline.shards.token_files import read_parts

DOCUMENTS = [[1, 2, 3], [65_534], [7] * 5]


def write(prefix, n_vocab):
    with IndexedWriter(prefix, token_dtype(n_vocab)) as writer:
        for document in DOCUMENTS:
            writer.add_document(np.array(document))
    return writer


@pytest.mark.parametrize(("n_vocab", "code", "letter", "size"), [(65_535, 8, "H", 2), (65_536, 4, "i", 4)])
def test_the_layout_is_megatrons(tmp_path, n_vocab, code, letter, size):
    writer = write(tmp_path / "shard", n_vocab)
    assert (writer.tokens, writer.documents) == (9, 3)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 3, 4)
    expected += struct.pack("<3i", 3, 1, 5) + struct.pack("<3q", 0, 3 * size, 4 * size) + struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "shard.idx").read_bytes() == expected
    flat = [token for document in DOCUMENTS for token in document]
    assert (tmp_path / "shard.bin").read_bytes() == struct.pack(f"<9{letter}", *flat)

    reader = IndexedReader(tmp_path / "shard")
    assert [reader[i].tolist() for i in range(len(reader))] == DOCUMENTS and reader.tokens.tolist() == flat


@pytest.mark.parametrize("most", [1, 3, 4, 5, 7])
def test_a_read_that_returns_less_goes_on_in_the_right_place(tmp_path, monkeypatch, most):
    """As network file systems and signals do it: also in the middle of an id."""
    write(tmp_path / "shard", 1000)
    preadv, calls = os.preadv, []

    def short(descriptor, views, position):
        calls.append(position)
        (view,) = views
        return preadv(descriptor, [memoryview(view).cast("B")[:most]], position)

    monkeypatch.setattr(os, "preadv", short)
    file = IndexedReader(tmp_path / "shard").file
    calls.clear()
    ids = np.zeros(5, "<u2")
    file.read_into(4, memoryview(ids))
    assert ids.tolist() == [3, 65_534, 7, 7, 7]
    assert len(calls) == -(-10 // most)
    with pytest.raises(ValueError, match=r"shard\.bin: truncated, it ends before byte 20"):
        file.read_into(10, memoryview(ids))

    ids = np.zeros(6, "<u2")
    assert read_parts([None, file], [(1, 4, 0, 4), (1, 0, 3, 6)], memoryview(ids)) == [7, 3]
    assert ids.tolist() == [3, 65_534, 7, 1, 2, 3]
    with pytest.raises(ValueError, match=r"shard\.bin: truncated, it ends before byte 20"):
        read_parts([file], [(0, 10, 0, 5)], memoryview(ids))


def test_parts_are_read_from_files_that_were_not_opened_yet_and_errors_name_the_file(tmp_path, monkeypatch):
    write(tmp_path / "shard", 1000)
    file, ids = IndexedReader(tmp_path / "shard").file, np.zeros(5, "<u2")
    assert read_parts([file], [(0, 4, 0, 5)], memoryview(ids)) == [7]

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(ValueError, match=r"shard\.bin: cannot be read: Input/output error"):
        read_parts([file], [(0, 4, 0, 5)], memoryview(ids))


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".bin", lambda b: b[:-1], r"shard\.bin: truncated"),
        (".bin", lambda b: b"", r"shard\.bin: truncated"),
        (".bin", lambda b: b + b"\0\0", r"shard\.bin: truncated or damaged"),
        (".bin", None, r"shard\.bin: cannot be opened"),
        (".idx", lambda b: b[:20], r"shard\.idx: truncated"),
        (".idx", lambda b: b[:-3], r"shard\.idx: truncated"),
        (".idx", lambda b: b"", r"shard\.idx: truncated"),
        (".idx", lambda b: b"X" + b[1:], r"shard\.idx: not a Megatron index"),
        (".idx", lambda b: b[:9] + b"\2" + b[10:], r"shard\.idx: index version 2"),
        (".idx", lambda b: b[:17] + b"\7" + b[18:], r"shard\.idx: dtype code 7"),
        (".idx", lambda b: b[:17] + b"\4" + b[18:], r"shard\.bin: truncated or damaged"),
        (".idx", lambda b: b[:46] + b"\2" + b[47:], r"shard\.idx: damaged index, its pointers"),
        (".idx", None, r"shard\.idx: cannot be opened"),
    ],
)
def test_damage_is_one_clear_line_naming_the_file(tmp_path, suffix, change, message):
    write(tmp_path / "shard", 1000)
    path = tmp_path / f"shard{suffix}"
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        IndexedReader(tmp_path / "shard").check()
    assert "\n" not in str(error.value)


def test_a_file_that_another_thread_closes_is_read_to_the_end(tmp_path, monkeypatch):
    """Its number would be that of the next file that is opened."""
    monkeypatch.setattr(token_files, "MAX_OPEN_FILES", 1)
    files, preadv = [], os.preadv
    for i in range(3):
        with IndexedWriter(tmp_path / str(i), token_dtype(1000)) as writer:
            writer.add_document(np.full(4, i))
        files.append(IndexedReader(tmp_path / str(i)).file)

    def interrupted(*arguments):
        monkeypatch.setattr(os, "preadv", preadv)
        assert [file.read(0, 1) for file in files[1:]] == [1, 2] and files[0]._file is None
        return preadv(*arguments)

    for read in (lambda ids: files[0].read_into(0, ids), lambda ids: read_parts(files, [(0, 0, 0, 4)], ids)):
        ids = np.full(4, 99, "<u2")
        files[0].read(0, 1)
        monkeypatch.setattr(os, "preadv", interrupted)
        read(memoryview(ids))
        assert os.preadv is preadv and ids.tolist() == [0] * 4


def test_many_threads_read_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "MAX_OPEN_FILES", 3)
    files = []
    for i in range(20):
        with IndexedWriter(tmp_path / str(i), token_dtype(1000)) as writer:
            writer.add_document(np.full(64, i))
        files.append(IndexedReader(tmp_path / str(i)).file)

    def read(thread):
        order = np.random.default_rng(thread).integers(0, len(files), 10_000)
        return [i for i in order if not (files[i].read(0, 64) == i).all()]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [[], [], [], []]
    # What was replaced on disk is not read as if it were the old one, nor the old one as if it were new.
    with IndexedWriter(tmp_path / "0", token_dtype(1000)) as writer:
        writer.add_document(np.full(64, 99))
    assert (IndexedReader(tmp_path / "0").file.read(0, 64) == 99).all()
    for file in files[1:]:
        file.read(0, 1)
    with pytest.raises(ValueError, match=r"0\.bin: was replaced while it was in use"):
        files[0].read(0, 64)
