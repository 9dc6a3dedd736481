"""Documents from named corpora, local files and Hugging Face datasets; see `open_source`."""

import glob
import gzip
import hashlib
import io
import json
import os
import platform
import random
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
_TEST_FOLDERS = {"test", "tests", "idle_test", "lib2to3"}
_PACKAGE_FOLDERS = {"site-packages", "dist-packages"}
_PYSTDLIB_MIN_FILES = 100
_MIN_SOURCE_BYTES = 200  # an `__init__.py` with a licence line is not a document


@dataclass(frozen=True)
class Source:
    """A corpus that can be read any number of times.

    spec: what the user asked for. kind: pystdlib, installed, synthetic, files or huggingface. description: where the
        text really comes from.
    fingerprint: changes when the inputs do (for files: path, size and time of change). documents: starts one pass over
        the texts.
    """

    spec: str
    kind: str
    description: str
    fingerprint: str
    documents: Callable[[], Iterator[str]]


def open_source(
    spec: str, *, text_column: str = "text", split: str | None = None, config_name: str | None = None
) -> Source:
    """A corpus by name.

    spec: `pystdlib` (the running Python's own library without its tests; `synthetic` where it has no sources),
        `installed` (that and every installed package), `synthetic[:documents=N,seed=S]`, a local file, glob or
        directory of .txt, .md, .jsonl and .parquet (all but parquet also .gz or .zst), or else the name of a Hugging
        Face dataset, streamed. Local paths come before dataset names, except that a directory with `split` or
        `config_name` is opened as a Hugging Face dataset.
    text_column: the field of .jsonl, .parquet and Hugging Face records that holds the text.
    split, config_name: of a Hugging Face dataset; split is "train" when not given.

    Raises ValueError when nothing is found here; reading raises ValueError naming the file and the line or row of a bad
    record.
    """
    name, _, parameters = spec.partition(":")
    if name == "synthetic":
        return _synthetic(spec, parameters)
    if spec == "pystdlib":
        return _pystdlib(spec)
    if spec == "installed":
        return _installed(spec)
    path = Path(spec).expanduser()
    if path.is_dir() and (split or config_name):
        return _huggingface(spec, str(path.resolve()), text_column, split, config_name)
    if path.exists() or glob.has_magic(spec):
        return _local(spec, path, text_column)
    looks_like_path = spec.startswith((".", "/", "~")) or _content_suffix(path) in SUFFIXES
    if looks_like_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec):
        raise ValueError(f"source {spec!r}: no such file or directory")
    return _huggingface(spec, spec, text_column, split, config_name)


# --- named corpora --------------------------------------------------------------------------------


def _pystdlib(spec: str) -> Source:
    files = _stdlib_files()
    if len(files) < _PYSTDLIB_MIN_FILES:
        fallback = _synthetic("synthetic", "")
        description = f"{fallback.description}, because this Python ships its standard library without sources"
        return Source(spec, fallback.kind, description, fallback.fingerprint, fallback.documents)

    def documents() -> Iterator[str]:
        from pydoc_data import topics

        yield from _python_texts(files)
        yield from (text for _, text in sorted(topics.topics.items()))

    description = (
        f"standard library of Python {platform.python_version()}, {len(files)} files and the language reference"
    )
    return Source(spec, "pystdlib", description, _fingerprint(files), documents)


def _installed(spec: str) -> Source:
    roots = sorted({Path(sysconfig.get_paths()[key]) for key in ("purelib", "platlib")})
    files = _stdlib_files() + [file for root in roots for file in sorted(root.rglob("*.py")) if file.is_file()]
    description = f"Python sources of this environment, {len(files)} files"
    return Source(spec, "installed", description, _fingerprint(files), lambda: _python_texts(files))


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for file in sorted(root.rglob("*.py")):
        folders = file.relative_to(root).parts[:-1]
        # `_sysconfigdata*` and `config-*` hold this machine's build settings; pydoc_data's topics are read as text, not
        # as source.
        machine = file.name.startswith("_sysconfigdata") or any(folder.startswith("config-") for folder in folders)
        if not machine and not _TEST_FOLDERS.union(_PACKAGE_FOLDERS, {"pydoc_data"}).intersection(folders):
            files.append(file)
    return files


def _python_texts(files: list[Path]) -> Iterator[str]:
    for file in files:
        try:
            data = file.read_bytes()
            if len(data) >= _MIN_SOURCE_BYTES:
                yield data.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a package's deliberately broken or private file is no reason to stop


_SUBJECTS = (
    "the river",
    "a small engine",
    "the night train",
    "our neighbour",
    "the old clock",
    "a grey cat",
    "the teacher",
    "a slow program",
)
_VERBS = ("follows", "remembers", "repairs", "counts", "measures", "watches", "carries", "explains")
_OBJECTS = (
    "the bridge",
    "seven stones",
    "a long letter",
    "the last page",
    "every window",
    "a green lamp",
    "the map",
    "two answers",
)
_PLACES = ("in the morning", "behind the mill", "without a sound", "near the harbour", "once a year", "after the rain")


def _synthetic(spec: str, parameters: str) -> Source:
    """Small documents of sentences and sums: learnable, and the same on every machine and Python version."""
    values = {"documents": 1000, "seed": 0}
    for item in filter(None, parameters.split(",")):
        key, _, value = item.partition("=")
        if key not in values or not value.isdecimal():
            raise ValueError(f"source {spec!r}: expected synthetic:documents=N,seed=S with whole numbers, not {item!r}")
        values[key] = int(value)

    def documents() -> Iterator[str]:
        # Only `random()` is promised to give the same numbers in every Python version.
        generator = random.Random(values["seed"])

        def pick(choices: tuple[str, ...]) -> str:
            return choices[int(generator.random() * len(choices))]

        for index in range(values["documents"]):
            lines = [f"Note {index}."]
            for _ in range(8 + int(generator.random() * 24)):
                if generator.random() < 0.25:
                    a, b = int(generator.random() * 50), int(generator.random() * 50)
                    lines.append(f"{a} + {b} = {a + b}.")
                else:
                    sentence = f"{pick(_SUBJECTS)} {pick(_VERBS)} {pick(_OBJECTS)} {pick(_PLACES)}."
                    lines.append(sentence[0].upper() + sentence[1:])
            yield "\n".join(lines) + "\n"

    description = f"synthetic text, {values['documents']} documents from seed {values['seed']}"
    return Source(spec, "synthetic", description, json.dumps(values, sort_keys=True), documents)


# --- local files ----------------------------------------------------------------------------------


def _local(spec: str, path: Path, text_column: str) -> Source:
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and _content_suffix(file) in SUFFIXES]
    elif path.exists():
        files = [path]
    else:
        files = [file for file in map(Path, sorted(glob.glob(str(path), recursive=True))) if file.is_file()]
    kinds = ", ".join(SUFFIXES)
    if not files:
        raise ValueError(f"source {spec!r}: no file there ends in one of {kinds} (or these with .gz or .zst)")
    for file in files:
        if _content_suffix(file) not in SUFFIXES or (
            file.suffix in COMPRESSIONS and _content_suffix(file) == ".parquet"
        ):
            raise ValueError(
                f"source {spec!r}: {file} is of no known kind; known are {kinds}, all but .parquet also "
                f"with .gz or .zst"
            )

    def documents() -> Iterator[str]:
        for file in files:
            yield from _file_documents(file, text_column)

    count = f"{len(files)} files" if len(files) > 1 else "1 file"
    return Source(spec, "files", f"local {count} at {path.absolute()}", _fingerprint(files, text_column), documents)


def _content_suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _file_documents(path: Path, text_column: str) -> Iterator[str]:
    suffix = _content_suffix(path)
    if suffix == ".parquet":
        yield from _parquet_documents(path, text_column)
        return
    try:
        with _open_decompressed(path) as stream:
            if suffix in TEXT_SUFFIXES:
                yield _decode_utf8(stream.read(), str(path))
            else:
                yield from _jsonl_documents(stream, path, text_column)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _jsonl_documents(stream: io.BufferedIOBase, path: Path, text_column: str) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        where = f"{path}, line {number}"
        text = _decode_utf8(line, where)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
        if text_column not in record:
            raise ValueError(f"{where}: {_no_column(text_column, list(record))}")
        yield _checked_text(record[text_column], text_column, where)


def _parquet_documents(path: Path, text_column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_column not in names:
                raise ValueError(f"{path}: {_no_column(text_column, names)}")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield _checked_text(text, text_column, f"{path}, row {row}")
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {_first_line(error)}") from error


def _open_decompressed(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdStream(path), buffer_size=1 << 17)
    return open(path, "rb")


class _ZstdStream(io.RawIOBase):
    """Reads every frame of a .zst file. Unlike zstandard's own reader, a file cut short inside a frame is an error, not
    an early end.
    """

    def __init__(self, path: Path):
        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside_frame = False
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            self._input = self._input or self._file.read(1 << 17)
            if not self._input:
                if self._inside_frame:
                    raise EOFError("compressed file ended before the end-of-stream marker was reached")
                return 0
            self._inside_frame = True
            self._output = self._frame.decompress(self._input)
            self._input = b""
            if self._frame.eof:
                self._input = self._frame.unused_data
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._inside_frame = False
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


# --- Hugging Face datasets ------------------------------------------------------------------------


def _huggingface(spec: str, path: str, text_column: str, split: str | None, config_name: str | None) -> Source:
    import datasets

    split = split or "train"
    label = f"Hugging Face dataset {path!r}" + (f" ({config_name})" if config_name else "") + f", split {split!r}"
    try:
        dataset = datasets.load_dataset(path, name=config_name, split=split, streaming=True)
    except Exception as error:  # the library raises many kinds, some of them bare Exception subclasses
        raise ValueError(
            f"source {spec!r} is no built-in corpus (pystdlib, installed, synthetic) and no local file, and cannot "
            f"be opened as {label}: {_first_line(error)}"
        ) from error
    names = dataset.column_names
    if names is not None and text_column not in names:
        raise ValueError(f"{label}: {_no_column(text_column, names)}")

    def documents() -> Iterator[str]:
        row = 0
        batches = dataset.select_columns([text_column]).iter(batch_size=1000)
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:
                raise ValueError(f"{label}: reading failed after row {row}: {_first_line(error)}") from error
            if batch is None:
                return
            for text in batch[text_column]:
                row += 1
                yield _checked_text(text, text_column, f"{label}, row {row}")

    return Source(spec, "huggingface", label, json.dumps([path, config_name, split, text_column]), documents)


# --- shared by all --------------------------------------------------------------------------------


def _fingerprint(files: list[Path], text_column: str = "") -> str:
    digest = hashlib.sha256(text_column.encode())
    for file in files:
        status = os.stat(file)
        digest.update(f"{file.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _decode_utf8(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text (byte {error.start}: {error.reason})") from error


def _checked_text(value: object, text_column: str, where: str) -> str:
    if value is None:  # a missing text is an empty one, which `prepare` drops and counts
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {text_column!r} holds {type(value).__name__}, not text")
    return value


def _no_column(text_column: str, names: list[str]) -> str:
    return f"no column {text_column!r}, only {', '.join(map(repr, names))}; choose one with --text-column"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
