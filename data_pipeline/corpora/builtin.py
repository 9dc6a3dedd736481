"""Corpora that need no download: Python's standard library, installed packages, and made-up sentences."""

import platform
import random
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_pipeline.corpora.files import local_file, read_unchanged
from data_pipeline.corpora.part import Part, TextSource, fingerprint_of, grouped

_TEST_FOLDERS = {"test", "tests", "idle_test", "lib2to3"}
_PACKAGE_FOLDERS = {"site-packages", "dist-packages"}
_PYSTDLIB_MIN_FILES = 100
_MIN_SOURCE_BYTES = 200  # an `__init__.py` with a licence line is not a document


def pystdlib(spec: str) -> TextSource:
    """Open the sources of Python's standard library, or `synthetic` where it has none."""
    files = _stdlib_files()
    if len(files) < _PYSTDLIB_MIN_FILES:
        fallback = synthetic("synthetic", "")
        description = f"{fallback.description}, because this Python ships its standard library without sources"
        return TextSource(spec, fallback.kind, description, fallback.parts)
    topics = Part("pydoc topics", f"pydoc topics of Python {platform.python_version()}", 0, _read_topics)
    description = (
        f"standard library of Python {platform.python_version()}, {len(files)} files and the language reference"
    )
    return TextSource(spec, "pystdlib", description, [*_python_parts(files), topics])


def installed(spec: str) -> TextSource:
    """Open the Python sources of this environment: the standard library's and all packages'."""
    roots = sorted({Path(sysconfig.get_paths()[key]) for key in ("purelib", "platlib")})
    files = _stdlib_files() + [file for root in roots for file in sorted(root.rglob("*.py")) if file.is_file()]
    description = f"Python sources of this environment, {len(files)} files"
    return TextSource(spec, "installed", description, _python_parts(files))


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
            fingerprint_of(group),
            sum(file.size for file in group),
            partial(read_unchanged, group, partial(_read_python, [file.path for file in group])),
        )
        for group in grouped(files)
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


def synthetic(spec: str, parameters: str) -> TextSource:
    """Make small documents of sentences and sums: learnable, and the same on every machine and Python version.

    Args:
        spec: What the user asked for.
        parameters: `documents=N,seed=S`, or only one of them, or nothing.

    Raises:
        ValueError: `parameters` are something else.
    """
    values = {"documents": 1000, "seed": 0}
    for item in filter(None, parameters.split(",")):
        key, _, value = item.partition("=")
        if key not in values or not value.isdecimal():
            raise ValueError(f"source {spec!r}: expected synthetic:documents=N,seed=S with whole numbers, not {item!r}")
        values[key] = int(value)
    description = f"synthetic text, {values['documents']} documents from seed {values['seed']}"
    name = "synthetic:documents={documents},seed={seed}".format(**values)
    return TextSource(spec, "synthetic", description, [Part(name, name, 0, partial(_read_synthetic, **values))])


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
