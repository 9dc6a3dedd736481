"""Corpora that need no download: Python's standard library, installed packages, and made-up texts."""

import platform
import random
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_pipeline.corpora.files import local_file, read_unchanged
from data_pipeline.corpora.part import Part, TextSource, fingerprint_of, grouped
from data_pipeline.needles.arrange import arrange, words_of
from data_pipeline.needles.tasks import TASKS, make_episode

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


_NEEDLES_FORM = f"needles:task={'|'.join(TASKS)},documents=N,least=WORDS,most=WORDS,seed=S"


def needles(spec: str, parameters: str) -> TextSource:
    """Make texts that hide a fact, each followed by a question about it and the answer.

    Args:
        spec: What the user asked for.
        parameters: `task=passkey,documents=N,least=WORDS,most=WORDS,seed=S`, or some of them, or nothing. A text up to
            its answer has a random number of words between the two, where digits and punctuation count as words
            (`needles.arrange.words_of`), and the fact stands at a random depth.

    Raises:
        ValueError: `parameters` are something else, or the texts are too short for the task.
    """
    task, values = "passkey", {"documents": 10_000, "least": 96, "most": 256, "seed": 0}
    for item in filter(None, parameters.split(",")):
        key, _, value = item.partition("=")
        if key == "task" and value in TASKS:
            task = value
        elif key in values and value.isdecimal():
            values[key] = int(value)
        else:
            raise ValueError(f"source {spec!r}: expected {_NEEDLES_FORM} with whole numbers, not {item!r}")
    if values["least"] > values["most"]:
        raise ValueError(f"source {spec!r}: least={values['least']} is more than most={values['most']}; exchange them")
    try:
        for _ in _read_needles(task, **values | {"documents": 1, "most": values["least"]}):
            pass
    except ValueError as error:
        raise ValueError(f"source {spec!r}: least={values['least']}: {error}") from error
    name = f"needles:task={task}," + ",".join(f"{key}={value}" for key, value in values.items())
    description = f"texts with needles for the task {task}, {values['documents']} documents from seed {values['seed']}"
    return TextSource(spec, "needles", description, [Part(name, name, 0, partial(_read_needles, task, **values))])


def _read_needles(task: str, documents: int, least: int, most: int, seed: int) -> Iterator[str]:
    generator = random.Random(seed)
    for _ in range(documents):
        episode = make_episode(task, generator)
        length = least + int(generator.random() * (most - least + 1))
        yield "".join(arrange(episode, generator.random(), length, words_of, generator)) + episode.answer
