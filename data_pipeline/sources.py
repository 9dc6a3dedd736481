"""Documents from named corpora, local and remote files and Hugging Face datasets; see `open_source`."""

import glob
import hashlib
import json
import platform
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_pipeline.files import (
    File,
    content_suffix,
    find_files,
    first_line,
    is_url,
    local_file,
)
from data_pipeline.records import (
    Malformed,
    no_such_column,
    parquet_file,
    read_huggingface,
    read_jsonl,
    read_parquet,
    read_texts,
    stream_huggingface,
)

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
_TEST_FOLDERS = {"test", "tests", "idle_test", "lib2to3"}
_PACKAGE_FOLDERS = {"site-packages", "dist-packages"}
_PYSTDLIB_MIN_FILES = 100
_MIN_SOURCE_BYTES = 200  # an `__init__.py` with a licence line is not a document
# A large file is cut into about 64 parts, neither too small to be worth a file nor too large to be done again. Those of
# .jsonl are equal and, beyond four, a multiple of four (so down to half of _MIN_PART_BYTES), that 2 or 4 processes end
# at one time. How a file is cut depends on nothing but its size, so that other files may come and go.
_PARTS, _MIN_PART_BYTES, _MAX_PART_BYTES = 64, 8 << 20, 128 << 20


@dataclass(frozen=True)
class Part:
    """What one process reads at a time.

    name: for people, without the directory. fingerprint: changes when the content does. size: bytes to be read, 0 when
    not known. read: starts one pass over the records; it can be pickled. It raises ValueError for what cannot be read
    at all, naming the file.
    """

    name: str
    fingerprint: str
    size: int
    read: Callable[[], Iterator[str | Malformed]]


@dataclass(frozen=True)
class Source:
    """A corpus that can be read any number of times.

    spec: what the user asked for. kind: pystdlib, installed, synthetic, files or huggingface. description: where the
        text really comes from. parts: to be read in this order, or side by side.
    """

    spec: str
    kind: str
    description: str
    parts: list[Part]

    @property
    def fingerprint(self) -> str:
        """Changes when the inputs do."""
        return hashlib.sha256(json.dumps([part.fingerprint for part in self.parts]).encode()).hexdigest()

    def documents(self) -> Iterator[str]:
        """All texts in order. Raises ValueError at the first malformed record."""
        for part in self.parts:
            for record in part.read():
                if isinstance(record, Malformed):
                    raise ValueError(str(record))
                yield record


def open_source(
    spec: str,
    *,
    text_column: str = "text",
    split: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
) -> Source:
    """A corpus by name.

    spec: `pystdlib` (the running Python's own library without its tests; `synthetic` where it has no sources),
        `installed` (that and every installed package), `synthetic[:documents=N,seed=S]`, a file, glob or directory of
        .txt, .md, .jsonl and .parquet (all but parquet also .gz or .zst), local or behind a URL that fsspec knows
        (s3://, gs://, https://), or else the name of a Hugging Face dataset, streamed. Local paths come before dataset
        names, except that a directory with `split` or `config_name` is opened as a Hugging Face dataset; A/B is not
        sought on the hub where A is a local directory.
    text_column: the field of .jsonl, .parquet and Hugging Face records that holds the text.
    split, config_name, revision: of a Hugging Face dataset; split is "train" when not given.

    Raises ValueError when nothing is found here.
    """
    name, _, parameters = spec.partition(":")
    if name == "synthetic":
        return _synthetic(spec, parameters)
    if spec == "pystdlib":
        return _pystdlib(spec)
    if spec == "installed":
        return _installed(spec)
    if is_url(spec):
        return _files(spec, text_column)
    path = Path(spec).expanduser()
    if path.is_dir() and (split or config_name):
        return _huggingface(spec, str(path.resolve()), text_column, split, config_name, revision)
    if path.exists() or glob.has_magic(spec):
        return _files(spec, text_column)
    if "/" in spec and Path(path.parts[0]).is_dir():  # a mistake more often than a name on the hub
        raise ValueError(
            f"source {spec!r}: no such file or directory in {path.parts[0]!r}; for a Hugging Face dataset of that name "
            f"run where there is no such directory"
        )
    looks_like_path = spec.startswith((".", "/", "~")) or content_suffix(path.name) in (*SUFFIXES, ".json", ".csv")
    if looks_like_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec):
        raise ValueError(f"source {spec!r}: no such file or directory")
    return _huggingface(spec, spec, text_column, split, config_name, revision)


def _grouped(files: list[File], most: int) -> Iterator[list[File]]:
    """Neighbours that together hold about `most` bytes."""
    group, size = [], 0
    for file in files:
        group.append(file)
        size += file.size
        if size >= most:
            yield group
            group, size = [], 0
    if group:
        yield group


def _part_bytes(file: File) -> int:
    count = -(-file.size // min(max(-(-file.size // _PARTS), _MIN_PART_BYTES), _MAX_PART_BYTES))
    if count > 4:
        count = -(-count // 4) * 4
    return -(-file.size // max(count, 1))


def _fingerprint(files: Iterable[File], *rest: object) -> str:
    return json.dumps([[[file.path, file.size, file.version] for file in files], *rest])


# --- named corpora --------------------------------------------------------------------------------


def _pystdlib(spec: str) -> Source:
    files = _stdlib_files()
    if len(files) < _PYSTDLIB_MIN_FILES:
        fallback = _synthetic("synthetic", "")
        description = f"{fallback.description}, because this Python ships its standard library without sources"
        return Source(spec, fallback.kind, description, fallback.parts)
    topics = Part("pydoc topics", f"pydoc topics of Python {platform.python_version()}", 0, _read_topics)
    description = (
        f"standard library of Python {platform.python_version()}, {len(files)} files and the language reference"
    )
    return Source(spec, "pystdlib", description, [*_python_parts(files), topics])


def _installed(spec: str) -> Source:
    roots = sorted({Path(sysconfig.get_paths()[key]) for key in ("purelib", "platlib")})
    files = _stdlib_files() + [file for root in roots for file in sorted(root.rglob("*.py")) if file.is_file()]
    description = f"Python sources of this environment, {len(files)} files"
    return Source(spec, "installed", description, _python_parts(files))


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


def _python_parts(paths: list[Path]) -> list[Part]:
    files = [local_file(path) for path in paths]
    return [
        Part(
            f"{group[0].name} and {len(group) - 1} more Python files",
            _fingerprint(group),
            sum(file.size for file in group),
            partial(_read_python, [file.path for file in group]),
        )
        for group in _grouped(files, _MIN_PART_BYTES)
    ]


def _read_python(paths: list[str]) -> Iterator[str]:
    for path in paths:
        try:
            data = Path(path).read_bytes()
            if len(data) >= _MIN_SOURCE_BYTES:
                yield data.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a package's deliberately broken or private file is no reason to stop


def _read_topics() -> Iterator[str]:
    from pydoc_data import topics

    yield from (text for _, text in sorted(topics.topics.items()))


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
    description = f"synthetic text, {values['documents']} documents from seed {values['seed']}"
    name = "synthetic:documents={documents},seed={seed}".format(**values)
    return Source(spec, "synthetic", description, [Part(name, name, 0, partial(_read_synthetic, **values))])


def _read_synthetic(documents: int, seed: int) -> Iterator[str]:
    generator = random.Random(seed)  # only `random()` is promised to give the same numbers in every Python version

    def pick(choices: tuple[str, ...]) -> str:
        return choices[int(generator.random() * len(choices))]

    for index in range(documents):
        lines = [f"Note {index}."]
        for _ in range(8 + int(generator.random() * 24)):
            if generator.random() < 0.25:
                a, b = int(generator.random() * 50), int(generator.random() * 50)
                lines.append(f"{a} + {b} = {a + b}.")
            else:
                sentence = f"{pick(_SUBJECTS)} {pick(_VERBS)} {pick(_OBJECTS)} {pick(_PLACES)}."
                lines.append(sentence[0].upper() + sentence[1:])
        yield "\n".join(lines) + "\n"


# --- files ----------------------------------------------------------------------------------------


def _files(spec: str, text_column: str) -> Source:
    files = find_files(spec, SUFFIXES)
    kinds = ", ".join(SUFFIXES)
    if not files:
        raise ValueError(f"source {spec!r}: no file there ends in one of {kinds} (or these with .gz or .zst)")
    for file in files:
        if file.suffix not in SUFFIXES or (file.is_compressed and file.suffix == ".parquet"):
            raise ValueError(
                f"source {spec!r}: {file.path} is of no known kind; known are {kinds}, all but .parquet also "
                f"with .gz or .zst"
            )
    parts, texts = [], []
    for file in files:
        if file.suffix in TEXT_SUFFIXES:
            texts.append(file)
            continue
        parts += _text_parts(texts)
        texts = []
        cut = _parquet_parts if file.suffix == ".parquet" else _jsonl_parts
        parts += cut(file, _part_bytes(file), text_column)
    parts += _text_parts(texts)
    count = f"{len(files)} files" if len(files) > 1 else "1 file"
    where = f"at {spec}" if is_url(spec) else f"at {Path(spec).expanduser().absolute()}"
    return Source(spec, "files", f"{count} {where}", parts)


def _text_parts(files: list[File]) -> Iterator[Part]:
    for group in _grouped(files, _MIN_PART_BYTES):
        name = group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else "")
        paths = [file.path for file in group]
        yield Part(name, _fingerprint(group), sum(file.size for file in group), partial(read_texts, paths))


def _jsonl_parts(file: File, most: int, column: str) -> Iterator[Part]:
    # Servers of web pages need not answer for a range of bytes.
    if file.is_compressed or file.path.startswith(("http://", "https://")) or file.size <= most:
        yield Part(file.name, _fingerprint([file], column), file.size, partial(read_jsonl, file.path, 0, None, column))
        return
    for start in range(0, file.size, most):
        stop = min(start + most, file.size)
        read = partial(read_jsonl, file.path, start, stop, column)
        yield Part(
            f"{file.name}, bytes {start} to {stop}", _fingerprint([file], column, start, stop), stop - start, read
        )


def _parquet_parts(file: File, most: int, column: str) -> Iterator[Part]:
    groups = [None]
    if file.size > 2 * most:  # only then is it worth a look at the file
        with parquet_file(file.path) as parquet:
            each = -(-most * parquet.num_row_groups // file.size)
            groups = [list(range(parquet.num_row_groups))[i : i + each] for i in range(0, parquet.num_row_groups, each)]
    for group in groups:
        name = file.name + (f", row groups {group[0]} to {group[-1]}" if group else "")
        fingerprint = _fingerprint([file], column, group)
        yield Part(name, fingerprint, file.size // len(groups), partial(read_parquet, file.path, group, column))


# --- Hugging Face datasets ------------------------------------------------------------------------


def _huggingface(
    spec: str, path: str, column: str, split: str | None, config_name: str | None, revision: str | None
) -> Source:
    split = split or "train"
    label = f"Hugging Face dataset {path!r}" + (f" ({config_name})" if config_name else "") + f", split {split!r}"
    label += f", revision {revision}" if revision else ""
    which = {"path": path, "name": config_name, "split": split, "revision": revision}
    not_local = ""
    if Path(path).is_dir():
        content = [[file.path, file.size, file.version] for file in find_files(path, None)]
    else:
        which["revision"] = content = _resolved(path, revision)
        not_local = "is no built-in corpus (pystdlib, installed, synthetic), no local file, and "
    try:
        dataset = stream_huggingface(which)
    except Exception as error:  # the library raises many kinds, some of them bare Exception subclasses
        raise ValueError(f"source {spec!r} {not_local}cannot be opened as {label}: {first_line(error)}") from error
    names = dataset.column_names
    if names is not None and column not in names:
        raise ValueError(f"{label}: {no_such_column(column, names)}")
    count = dataset.num_shards
    parts = [
        Part(
            f"{path} {split} {index + 1} of {count}",
            json.dumps([which, content, column, index, count], sort_keys=True),
            0,
            partial(read_huggingface, which, label, column, index, count),
        )
        for index in range(count)
    ]
    return Source(spec, "huggingface", label, parts)


def _resolved(path: str, revision: str | None) -> str | None:
    """The commit that a revision is now, so that a dataset that changes is not mixed with its older self."""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(path, revision=revision, timeout=20).sha
    except Exception:  # without a network, what is in the cache will be read
        return revision
