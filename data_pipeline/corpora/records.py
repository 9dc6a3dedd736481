"""Records of files and of Hugging Face datasets: one document after the other, or the place of what holds none."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import orjson

from data_pipeline.corpora.columns import MOST_BYTES, TOO_LONG, Column, Malformed
from data_pipeline.corpora.compression import ERRORS
from data_pipeline.corpora.files import is_url, open_decompressed
from data_pipeline.printable import first_line, shown

Records = Iterator[str | np.ndarray | Malformed]

_TWICE = "key {!r} is there more than once, so it is not clear which one is meant"


def read_texts(paths: list[str]) -> Iterator[str | Malformed]:
    """Yield each file as one document."""
    for path in paths:
        with _reading(path), open_decompressed(path) as stream:
            data = stream.read(MOST_BYTES + 1)
        yield _decoded(data, path) if len(data) <= MOST_BYTES else Malformed(path, TOO_LONG)


def read_jsonl(path: str, start: int, stop: int | None, column: Column) -> Records:
    """Yield the documents of lines whose first byte is in [start, stop), to the end of the file when `stop` is None.

    What holds none is named by its line, or where `start` is not 0, so that lines are not counted, by its first byte.
    """
    with _reading(path), open_decompressed(path) as stream:
        position = _first_line_from(stream, start, stop)
        if stop is not None and position >= stop:
            return
        number = 0
        while line := stream.readline(MOST_BYTES + 1):
            number += 1
            length = len(line)
            record: str | np.ndarray | Malformed | None
            if length > MOST_BYTES:
                length += _rest_of_line(stream, line)
                record = Malformed("", TOO_LONG)
            else:
                record = _parsed(line, column)
            if record is not None:
                if isinstance(record, Malformed):
                    place = f"byte {position}" if start else f"line {number}"
                    record = Malformed(f"{path}, {place}", record.reason)
                yield record
            position += length
            if stop is not None and position >= stop:
                return


def _first_line_from(stream: BinaryIO, start: int, stop: int | None) -> int:
    """Go to the first line that begins at byte `start` or after it, if before `stop`, and return where that is."""
    if not start:
        return 0
    stream.seek(start - 1)
    position = start - 1
    while stop is None or position < stop:
        line = stream.readline(1 << 20)
        position += len(line)
        if not line or line.endswith(b"\n"):
            break
    return position


def _rest_of_line(stream: BinaryIO, line: bytes) -> int:
    """Read to the end of a line that is too long, and return how many bytes that were."""
    length = 0
    while not line.endswith(b"\n") and (line := stream.readline(1 << 20)):
        length += len(line)
    return length


def _parsed(line: bytes, column: Column) -> str | np.ndarray | Malformed | None:
    """Return the document in one line of JSON; None for a blank line."""
    if line.count(column.quoted) > 1 and _is_there_twice(line, column):
        return Malformed("", _TWICE.format(column.name))
    try:
        record = orjson.loads(line)
        if type(record) is dict and type(text := record.get(column.name)) is str and not column.ids:
            return text
    except orjson.JSONDecodeError:
        pass  # it may also be what orjson is stricter about, such as lone surrogates
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Malformed("", f"not UTF-8 text (byte {error.start}: {error.reason})")
    if text.startswith("\ufeff"):
        text = text[1:]
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # also for a number of thousands of digits
        return Malformed("", f"not valid JSON: {error}") if text.strip() else None
    return _of_record(record, column)


def _of_record(record: object, column: Column) -> str | np.ndarray | Malformed:
    if not isinstance(record, dict):
        return Malformed("", f"expected a JSON object, found {type(record).__name__}")
    if column.name not in record:
        return Malformed("", column.missing(list(record)))
    return column.checked(record[column.name], "")


def _is_there_twice(line: bytes, column: Column) -> bool:
    """Return whether the outermost object of a line has the column's key more than once."""
    times = 0

    def count(pairs: list[tuple[str, object]]) -> dict:
        nonlocal times
        times = sum(key == column.name for key, _ in pairs)  # the outermost object is complete last
        return {}

    try:
        outermost = json.loads(line, object_pairs_hook=count)
    except (ValueError, RecursionError):
        return False
    return isinstance(outermost, dict) and times > 1


class _Ambiguous(dict):
    """An object that has the column's key more than once."""


def read_json(path: str, column: Column) -> Records:
    """Yield the documents of a .json file: lines of objects, as in .jsonl, or one array of them, or a single one."""
    with _reading(path), open_decompressed(path) as stream:
        line = b"\n"
        while line and not line.strip():
            line = stream.readline(MOST_BYTES + 1)
    if not isinstance(_json_or_none(line, column), dict):
        with _reading(path), open_decompressed(path) as stream:
            data = stream.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
            raise ValueError(
                f"{shown(path)}: an array of more than {MOST_BYTES >> 20} MiB; write its records as lines of a .jsonl "
                f"file (`jq -c '.[]'`)"
            )
        value = _json_or_none(data, column) if len(data) <= MOST_BYTES else None
        del data
        if value is not None:
            for number, record in enumerate(value if isinstance(value, list) else [value], 1):
                twice = isinstance(record, _Ambiguous)
                document = Malformed("", _TWICE.format(column.name)) if twice else _of_record(record, column)
                if isinstance(document, Malformed):
                    document = Malformed(f"{path}, record {number}", document.reason)
                yield document
            return
    yield from read_jsonl(path, 0, None, column)


def _json_or_none(data: bytes, column: Column) -> Any:
    def made(pairs: list[tuple[str, Any]]) -> dict:
        kind = _Ambiguous if sum(key == column.name for key, _ in pairs) > 1 else dict
        return kind(pairs)

    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=made)
    except (ValueError, RecursionError):
        return None


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except ERRORS as error:
        raise ValueError(f"{shown(path)}: cannot be read: {shown(str(error))}") from error
    except Exception as error:
        if is_url(path):  # each store raises its own kinds
            raise ValueError(f"{shown(path)}: cannot be read: {shown(first_line(error))}") from error
        raise


def stream_huggingface(which: dict):
    """Open a dataset of the hub, or a local folder of that form, to be streamed."""
    import datasets

    return datasets.load_dataset(**which, streaming=True)


def read_huggingface(which: dict, label: str, column: Column, index: int, count: int) -> Records:
    """Yield a column of shard `index` of `count` of a streamed dataset."""
    row = 0
    where = f"{label}, shard {index + 1} of {count}"
    try:
        shard = stream_huggingface(which).shard(count, index, contiguous=True)
        for batch in shard.select_columns([column.name]).iter(batch_size=1000):
            for value in batch[column.name]:
                row += 1
                yield column.checked(value, f"{where}, row {row}")
    except Exception as error:
        raise ValueError(f"{shown(where)}: reading failed after row {row}: {shown(first_line(error))}") from error


def _decoded(data: bytes, where: str) -> str | Malformed:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Malformed(where, f"not UTF-8 text (byte {error.start}: {error.reason})")
