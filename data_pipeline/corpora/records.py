"""Records of files and of Hugging Face datasets, one text after the other, with the place of those that hold none."""

import contextlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import orjson
import zstandard

from data_pipeline.corpora.files import first_line, is_url, open_bytes, open_decompressed


@dataclass(frozen=True)
class Malformed:
    """A record that holds no text."""

    where: str
    """The file, and the line or row."""
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def read_texts(paths: list[str]) -> Iterator[str | Malformed]:
    """Yield each file as one document."""
    for path in paths:
        with _reading(path), open_decompressed(path) as stream:
            data = stream.read()
        yield _decoded(data, path)


def read_jsonl(path: str, start: int, stop: int | None, column: str) -> Iterator[str | Malformed]:
    """Yield the texts of lines whose first byte is in [start, stop), to the end of the file when `stop` is None."""
    with _reading(path), open_decompressed(path) as stream:
        if start:
            stream.seek(start - 1)
            position = start - 1 + len(stream.readline())
        else:
            position = 0
        before = None
        if stop is not None and position >= stop:
            return
        for number, line in enumerate(stream, 1):
            record = _parsed(line, column)
            if record is not None:
                if isinstance(record, Malformed):
                    if before is None:
                        before = _lines_before(path, position) - (number - 1) if start else 0
                    record = Malformed(f"{path}, line {before + number}", record.reason)
                yield record
            position += len(line)
            if stop is not None and position >= stop:
                return


def _lines_before(path: str, position: int) -> int:
    count = 0
    with open_bytes(path) as stream:
        while position > 0 and (block := stream.read(min(position, 1 << 22))):
            count += block.count(b"\n")
            position -= len(block)
    return count


def _parsed(line: bytes, column: str) -> str | Malformed | None:
    """Return the text of one line of JSON; None for a blank line."""
    try:
        record = orjson.loads(line)
        if type(record) is dict and type(text := record.get(column)) is str:
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
    if not isinstance(record, dict):
        return Malformed("", f"expected a JSON object, found {type(record).__name__}")
    if column not in record:
        return Malformed("", no_such_column(column, list(record)))
    return _checked(record[column], column, "")


def read_parquet(path: str, row_groups: list[int] | None, column: str) -> Iterator[str | Malformed]:
    """Yield a column of some row groups of a file, or of all."""
    import pyarrow

    try:
        with parquet_file(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise ValueError(f"{path}: {no_such_column(column, names)}")
            row = sum(file.metadata.row_group(i).num_rows for i in range(row_groups[0])) if row_groups else 0
            batches = file.iter_batches(1024, row_groups=row_groups, columns=[column], use_threads=False)
            for batch in batches:
                for text in batch.column(0).to_pylist():
                    row += 1
                    record = _checked(text, column, "")
                    yield Malformed(f"{path}, row {row}", record.reason) if isinstance(record, Malformed) else record
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {first_line(error)}") from error


@contextlib.contextmanager
def parquet_file(path: str):
    """Open a parquet file, wherever it is, and close it at the end."""
    import pyarrow
    import pyarrow.parquet

    try:
        with open_bytes(path) as stream, pyarrow.parquet.ParquetFile(stream) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {first_line(error)}") from error


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    except Exception as error:
        if is_url(path):  # each store raises its own kinds
            raise ValueError(f"{path}: cannot be read: {first_line(error)}") from error
        raise


def stream_huggingface(which: dict):
    """Open a dataset of the hub, or a local folder of that form, to be streamed."""
    import datasets

    return datasets.load_dataset(**which, streaming=True)


def read_huggingface(which: dict, label: str, column: str, index: int, count: int) -> Iterator[str | Malformed]:
    """Yield a column of shard `index` of `count` of a streamed dataset."""
    row = 0
    where = f"{label}, shard {index + 1} of {count}"
    try:
        shard = stream_huggingface(which).shard(count, index, contiguous=True)
        for batch in shard.select_columns([column]).iter(batch_size=1000):
            for text in batch[column]:
                row += 1
                yield _checked(text, column, f"{where}, row {row}")
    except Exception as error:
        raise ValueError(f"{where}: reading failed after row {row}: {first_line(error)}") from error


def _decoded(data: bytes, where: str) -> str | Malformed:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Malformed(where, f"not UTF-8 text (byte {error.start}: {error.reason})")


def _checked(value: object, column: str, where: str) -> str | Malformed:
    if value is None:  # a missing text is an empty one, which `prepare` drops and counts
        return ""
    if not isinstance(value, str):
        return Malformed(where, f"column {column!r} holds {type(value).__name__}, not text")
    return value


def no_such_column(column: str, names: list[str]) -> str:
    """Return a message that there is no such column, and which there are."""
    return f"no column {column!r}, only {', '.join(map(repr, names))}; choose one with --text-column"
