"""Records of tables: .parquet files, and Arrow files as Hugging Face's `save_to_disk` writes them.

Files come from elsewhere: what they say about themselves is checked before memory is taken for it, and texts are
decoded row by row where one of them is not UTF-8.
"""

import contextlib
from collections.abc import Iterator

import numpy as np

from data_pipeline.corpora.columns import MOST_BYTES, Column, Malformed
from data_pipeline.corpora.compression import MOST_EXPANSION
from data_pipeline.corpora.files import open_bytes
from data_pipeline.printable import first_line, shown
from data_pipeline.stores.errors import StoreError

_ROWS = 1024  # at a time
_BATCH_BYTES = 64 << 20
_BUFFER = 256 << 10  # a column is read in pieces that need not be neighbours
_ARROW_FILE = b"ARROW1"


def read_parquet(path: str, row_groups: list[int] | None, column: Column) -> Iterator[str | np.ndarray | Malformed]:
    """Yield a column of some row groups of a file, or of all."""
    with _table(path, "parquet"), parquet_file(path) as file:
        column.check_names(file.schema_arrow.names, path)
        row = sum(file.metadata.row_group(i).num_rows for i in range(row_groups[0])) if row_groups else 0
        rows = _rows_at_a_time(path, file.metadata, column)
        for batch in file.iter_batches(rows, row_groups=row_groups, columns=[column.name], use_threads=False):
            if batch.num_columns != 1:
                raise ValueError(f"{shown(path)}: several columns are called {column.name!r}; rename them")
            yield from _documents(batch.column(0), column, path, row)
            row += batch.num_rows


def read_arrow(path: str, column: Column) -> Iterator[str | np.ndarray | Malformed]:
    """Yield a column of an Arrow file, in the format of files or of streams."""
    with _table(path, "Arrow"), open_arrow(path) as batches:
        row = 0
        for batch in batches:
            column.check_names(batch.schema.names, path)
            values = batch.column(column.name)
            _check_places(values)
            for start in range(0, len(values), _ROWS):
                part = values.slice(start, _ROWS)
                yield from _documents(part, column, path, row)
                row += len(part)


@contextlib.contextmanager
def parquet_file(path: str):
    """Open a parquet file, wherever it is, and close it at the end."""
    import pyarrow.parquet

    with _table(path, "parquet"), open_bytes(path, _BUFFER) as stream, pyarrow.parquet.ParquetFile(stream) as file:
        yield file


@contextlib.contextmanager
def open_arrow(path: str):
    """Open an Arrow file, wherever it is: give an iterator of its batches, whose places have to be checked."""
    import pyarrow

    with _table(path, "Arrow"), open_bytes(path, _BUFFER) as stream:
        magic = stream.read(len(_ARROW_FILE))
        stream.seek(0)
        if magic == _ARROW_FILE:
            file = pyarrow.ipc.open_file(stream)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(stream))
        yield batches


@contextlib.contextmanager
def _table(path: str, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except StoreError as error:
        raise ValueError(f"{shown(path)}: cannot be read: {shown(str(error))}") from error
    except (OSError, MemoryError, pyarrow.ArrowException) as error:
        raise ValueError(f"{shown(path)}: cannot be read as {kind}: {shown(first_line(error))}") from error


def _check_places(values) -> None:
    """Check that an array as it was in a file has its values where its buffers are; texts may be other than UTF-8."""
    import pyarrow

    as_bytes = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    kind = as_bytes.get(values.type)
    (values if kind is None else values.view(kind)).validate(full=True)


def _rows_at_a_time(path: str, metadata, column: Column) -> int:
    """Return how many rows are read together, fewer where they are large.

    Raises:
        ValueError: The file says that a column becomes far larger than it is.
    """
    rows = _ROWS
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(i) for i in range(group.num_columns)]
        for chunk in chunks:
            if chunk.path_in_schema.split(".")[0] != column.name and chunk.path_in_schema != column.name:
                continue
            if chunk.total_uncompressed_size > max(MOST_BYTES, MOST_EXPANSION * chunk.total_compressed_size):
                raise ValueError(
                    f"{shown(path)}: column {column.name!r} becomes more than {MOST_EXPANSION} times as large as it "
                    f"is, as a compression bomb does; write the file anew without compression if that is meant"
                )
            each = chunk.total_uncompressed_size // max(group.num_rows, 1)
            rows = min(rows, max(1, _BATCH_BYTES // max(each, 1)))
    return rows


def _documents(values, column: Column, path: str, before: int) -> Iterator[str | np.ndarray | Malformed]:
    """Yield the documents of an array of which `before` rows of the file come first."""
    for row, value in enumerate(_python_values(values), before + 1):
        if isinstance(value, UnicodeDecodeError):
            yield Malformed(f"{path}, row {row}", f"not UTF-8 text (byte {value.start}: {value.reason})")
        elif isinstance(value, Exception):
            yield Malformed(f"{path}, row {row}", f"column {column.name!r} holds {values.type}, not text")
        else:
            document = column.checked(value, "")
            yield Malformed(f"{path}, row {row}", document.reason) if isinstance(document, Malformed) else document


def _python_values(values) -> list:
    """Return the values of an array, and errors in place of those that Python cannot hold: text that is not UTF-8."""
    import pyarrow

    if pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
        return list(_lists(values))
    try:
        return values.to_pylist()
    except (ValueError, OverflowError):
        return [_python_value(value) for value in values]


def _python_value(value) -> object:
    try:
        return value.as_py()
    except (ValueError, OverflowError) as error:
        return error


def _lists(values) -> Iterator:
    """Yield lists of numbers as arrays, which is far faster, and others as lists."""
    import pyarrow

    if not pyarrow.types.is_integer(values.type.value_type) or values.values.null_count:
        yield from values.to_pylist()
        return
    numbers, places = values.values.to_numpy(zero_copy_only=False), values.offsets.to_pylist()
    for start, stop, is_there in zip(places, places[1:], values.is_valid().to_pylist()):
        yield numbers[start:stop] if is_there else None
