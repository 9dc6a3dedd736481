"""Records of every kind of file: what is ambiguous, too large or not text is malformed or refused, with its place."""

import bz2
import json
import lzma
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline import open_source
from data_pipeline.corpora import columns, compression, records, tables
from data_pipeline.corpora.columns import Malformed

TEXTS = ["first", "zweiter: ß", "third"]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


def read(path, **options):
    return list(open_source(str(path), **options).documents())


def all_records(path, **options):
    found = [record for part in open_source(str(path), **options).parts for record in part.read()]
    return [str(record) if isinstance(record, Malformed) else record for record in found]


@pytest.mark.parametrize(
    "content",
    [
        JSONL,
        "\n\n" + JSONL,
        "\ufeff" + JSONL,
        json.dumps([{"text": text} for text in TEXTS]),
        json.dumps([{"text": text} for text in TEXTS], indent=1),
    ],
)
def test_json_is_lines_or_an_array(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    (tmp_path / "b.json.xz").write_bytes(lzma.compress(content.encode()))
    assert read(tmp_path / "a.json") == read(tmp_path / "b.json.xz") == TEXTS


def test_json_of_other_forms(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": "one"}, indent=1))
    assert read(path) == ["one"]
    for content, message in (
        ('[{"text": "x"}, 3]', "a.json, record 2: expected a JSON object, found int"),
        ('{"data": [1],\n "x": 1}', "a.json, record 1: no column 'text', only 'data', 'x'"),
        ('{"text": "x"}\n{"text": \n', "a.json, line 2: not valid JSON"),
        ("[" * 100_000, "a.json, line 1: not valid JSON"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read(path)


def test_xz_and_bz2(tmp_path):
    for suffix, pack in ((".XZ", lzma.compress), (".bz2", bz2.compress)):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(JSONL.encode()) + pack(JSONL.encode()))
        assert read(tmp_path / f"a.jsonl{suffix}") == TEXTS * 2
        (tmp_path / f"b.txt{suffix}").write_bytes(pack(JSONL.encode() * 99)[:-9])
        with pytest.raises(ValueError, match=rf"b.txt{suffix}: cannot be read: .*end-of-stream"):
            read(tmp_path / f"b.txt{suffix}")


@pytest.mark.parametrize(("suffix", "pack"), [("xz", lzma.compress), ("bz2", bz2.compress)])
def test_what_follows_a_compressed_member_is_another_one_or_an_error(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(pack(b"") + pack(JSONL.encode()) + bytes(300_000) + pack(JSONL.encode()) + bytes(8))
    assert read(path) == TEXTS * 2
    for junk in (b"junk", pack(JSONL.encode())[1:], bytes(8) + b"x" * 50):
        path.write_bytes(pack(JSONL.encode()) + junk)
        with pytest.raises(ValueError, match=rf"a.jsonl.{suffix}: cannot be read: "):
            read(path)
    path.write_bytes(pack(("x" * (3 << 20) + JSONL).encode()))
    assert len(all_records(path)) == 3, "more than one buffer comes out of a member"


def test_a_window_of_2_gib_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = packer.compress(JSONL.encode()) + packer.flush()
    assert zstandard.get_frame_parameters(data).window_size == 1 << 31
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    assert read(tmp_path / "a.jsonl.zst") == TEXTS


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["jsonl", "txt", "json"])
@pytest.mark.parametrize(
    ("suffix", "pack"), [(".zst", zstandard.compress), (".xz", lzma.compress), (".bz2", bz2.compress)]
)
def test_a_compression_bomb_ends_early(tmp_path, monkeypatch, kind, suffix, pack):
    monkeypatch.setattr(compression, "_EXPANDS_FREELY", 1 << 20)
    given = 0

    def count(self, buffer, readinto=compression._Limited.readinto):
        nonlocal given
        given += (size := readinto(self, buffer))
        return size

    monkeypatch.setattr(compression._Limited, "readinto", count)
    path = tmp_path / f"a.{kind}{suffix}"
    path.write_bytes(pack(bytes(32 << 20)))
    with pytest.raises(ValueError, match=rf"a\.{kind}{suffix}: cannot be read: becomes more than 200 times as large"):
        read(path)
    assert given < 200 * path.stat().st_size + (2 << 20), "it stopped there"


def test_little_comes_out_of_a_bomb_at_once(monkeypatch, tmp_path):
    path = tmp_path / "a.zst"
    path.write_bytes(zstandard.compress(bytes(1 << 30)))
    with open(path, "rb") as file:
        stream = compression._ZstdStream(file)
        stream.readinto(bytearray(10))
        assert len(stream._output) <= 64 << 20


def test_what_is_too_long_is_malformed_and_the_rest_is_read(tmp_path, monkeypatch):
    for module in (columns, records):
        monkeypatch.setattr(module, "MOST_BYTES", 1000)
    monkeypatch.setattr("data_pipeline.corpora.part.MIN_PART_BYTES", 700)  # the long line begins in one part only
    lines = [json.dumps({"text": text}) for text in ("a", "x" * 5000, "b", "y" * 980, "c")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    found = all_records(tmp_path / "a.jsonl")
    assert len(open_source(str(tmp_path / "a.jsonl")).parts) > 4
    assert [found[0], *found[2:]] == ["a", "b", "y" * 980, "c"]
    assert found[1].startswith(f"{tmp_path}/a.jsonl, line 2: longer than ") and "cut it into documents" in found[1]
    (tmp_path / "b.txt").write_text("x" * 1001)
    assert "b.txt: longer than" in all_records(tmp_path / "b.txt")[0]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "x" * 1001]}), tmp_path / "c.parquet")
    assert "c.parquet, row 2: longer than" in all_records(tmp_path / "c.parquet")[1]
    (tmp_path / "d.json").write_text("[\n" + ",".join(lines[:1] * 200) + "]")
    with pytest.raises(ValueError, match=r"d.json: an array of more than 0 MiB; write its records as lines"):
        read(tmp_path / "d.json")


def test_malformed_lines_of_a_later_part_are_named_without_reading_the_earlier_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.corpora.part.MIN_PART_BYTES", 1000)
    path, lines = tmp_path / "a.jsonl", [json.dumps({"text": "x" * 80}) for _ in range(100)]
    lines[3] = lines[60] = "{"
    path.write_text("\n".join(lines) + "\n")
    parts = open_source(str(path)).parts
    assert len(parts) > 5
    first, second = (str(one) for part in parts for one in part.read() if not isinstance(one, str))
    assert first.startswith(f"{path}, line 4: not valid JSON")
    assert second.startswith(f"{path}, byte {path.read_bytes().rindex(b'{' + os.linesep.encode())}: not valid JSON")


def texts_of_bytes(values, kind):
    as_bytes = pyarrow.array(values, {pyarrow.string(): pyarrow.binary()}.get(kind, pyarrow.large_binary()))
    return pyarrow.Array.from_buffers(kind, len(values), as_bytes.buffers())


def write_arrow(path, table):
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_arrow_file(path, table):
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_parquet(path, table):
    pyarrow.parquet.write_table(table, path)


WRITERS = {"parquet": write_parquet, "arrow": write_arrow, "ARROW": write_arrow_file}


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
@pytest.mark.parametrize("suffix", WRITERS)
def test_text_in_a_table_that_is_not_utf8_is_malformed(tmp_path, suffix, kind):
    path = tmp_path / f"a.{suffix}"
    WRITERS[suffix](path, pyarrow.table({"text": texts_of_bytes([b"ok", b"b\xff", None, b"\xc3\xa4"], kind)}))
    assert all_records(path) == ["ok", f"{path}, row 2: not UTF-8 text (byte 1: invalid start byte)", "", "ä"]


@pytest.mark.parametrize("suffix", WRITERS)
def test_ambiguous_columns_are_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    WRITERS[suffix](path, pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["text", "text"]))
    with pytest.raises(ValueError, match=rf"a\.{suffix}: 2 columns are called 'text'; rename them"):
        read(path)


def test_keys_that_are_there_twice_and_columns_that_could_be_two(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "a", "text": "b"}', '{"x": {"text": 1}, "text": "\\"text\\""}', '{"text": "text"}']
    path.write_text("\n".join(lines))
    assert all_records(path)[1:] == ['"text"', "text"]
    assert "a.jsonl, line 1: key 'text' is there more than once" in all_records(path)[0]
    array = tmp_path / "b.json"
    array.write_text(f"[{', '.join(lines)}]")
    assert all_records(array)[1:] == ['"text"', "text"]
    assert "b.json, record 1: key 'text' is there more than once" in all_records(array)[0]
    nested = pyarrow.table({"a.b": ["x"], "a": [{"b": "y"}]})
    pyarrow.parquet.write_table(nested, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"several columns are called 'a\.b'"):
        read(tmp_path / "a.parquet", text_column="a.b")


def test_a_parquet_file_that_expands_is_refused_before_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_BYTES", 1 << 20)
    table = pyarrow.table({"text": ["x" * (1 << 16)] * 64, "fine": ["y"] * 64})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", lambda *_, **options: iter(()))
    with pytest.raises(ValueError, match=r"a.parquet: column 'text' becomes more than 200 times"):
        read(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_column="fine") == []


def test_values_that_python_cannot_hold_are_malformed(tmp_path):
    write_arrow(tmp_path / "a.arrow", pyarrow.table({"text": pyarrow.array([2**62], pyarrow.timestamp("s"))}))
    (found,) = all_records(tmp_path / "a.arrow")
    assert found == f"{tmp_path}/a.arrow, row 1: column 'text' holds timestamp[s], not text"


def test_damaged_arrow_files_are_one_line(tmp_path):
    random = np.random.default_rng(int(os.environ.get("SEED", 0)))
    table = pyarrow.table({"text": TEXTS * 20})
    for suffix in ("arrow", "ARROW"):
        path = tmp_path / f"a.{suffix}"
        WRITERS[suffix](path, table)
        whole = path.read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            for place in random.integers(0, len(data), 3):
                data[place] ^= int(random.integers(1, 256))
            path.write_bytes(bytes(data) if random.random() < 0.7 else whole[: random.integers(0, len(whole))])
            try:
                all_records(path)
            except ValueError as error:
                assert str(error).startswith(str(path)) and "\n" not in str(error)


def test_token_ids_instead_of_texts(tmp_path):
    values = [[1, 2], [], None, [3]]
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": values}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in values))
    for name in ("a.parquet", "b.jsonl"):
        found = all_records(tmp_path / name, ids_column="input_ids")
        assert [ids.tolist() for ids in found] == [[1, 2], [], [], [3]]
        with pytest.raises(ValueError, match=r"no column 'text', only 'input_ids'.*--ids-column input_ids"):
            read(tmp_path / name)
    wrong = [["a"], [1.5], [[1]], [[1], [1, 2]], "text", [True], [2**70], {"a": 1}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in wrong))
    found = all_records(tmp_path / "c.jsonl", ids_column="input_ids")
    assert len(found) == len(wrong) and all(", line " in line and "token ids" in line for line in found)
