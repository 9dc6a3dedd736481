"""Every command of the documents parses: its files and modules exist, and its own parser takes its options.

A command is run up to the moment at which its parser has accepted the arguments, and stopped there. So the documents
cannot name an option that the code does not have, whoever renames it. Not read is docs/log.md: it says what was run at
the time.
"""

import argparse
import functools
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import jsonargparse
import pytest

# A package's `__main__` may have been imported by an earlier test: it is run anew all the same.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "log.md"),
]
SCRIPTS = [*sorted((ROOT / "examples").glob("*.py")), *sorted((ROOT / "launch").glob("*.py"))]

FENCED = re.compile(r"^ *```(?:bash|sh)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(
    r"`((?:[A-Z_]+=\S+ )*(?:python (?:-m|launch/|examples/)|torchrun |deepspeed --|sh launch/|pytest|make )[^`]*)`"
)
IN_DOCSTRING = re.compile(r"((?:python (?:-m|launch/|examples/)|torchrun |deepspeed --|sh launch/).*)$", re.MULTILINE)
OURS = re.compile(r"(configs|docs|examples|launch|tests)/[\w./-]+")
UNCHECKED = {
    ".",
    "apt",
    "cat",
    "cd",
    "docker",
    "export",
    "git",
    "hf",
    "kill",
    "mlflow",
    "pip",
    "pre-commit",
    "python3",
    "ray",
    "touch",
    "uv",
}
"""First words of lines in the documents that run nothing of this project."""


def lines() -> Iterator[tuple[str, str]]:
    """(document, command line) of all documents, without repetitions."""
    seen = set()
    for path in (*DOCUMENTS, *SCRIPTS):
        for line in _lines_of(path):
            if line and line not in seen:
                seen.add(line)
                yield str(path.relative_to(ROOT)), line


def _lines_of(path: Path) -> Iterator[str]:
    text = path.read_text()
    if path.suffix == ".py":
        docstring = text.split('"""')[1] if '"""' in text else ""
        yield from (line.strip().partition("`")[0] for line in IN_DOCSTRING.findall(docstring))
        return
    for block in FENCED.findall(text):
        yield from (line.strip() for line in block.replace("\\\n", " ").splitlines())
    yield from (line.replace("\\|", "|") for line in INLINE.findall(FENCED.sub("", text)))


def commands(line: str) -> Iterator[list[str]]:
    """Words of each command of a line, without variables before it, redirections and comments."""
    line = re.sub(r"\[(--[^\]]*)\]", r"\1", line)  # what may be left out
    words: list[str] = []
    for word in [*shlex.split(line, comments=True), "&&"]:
        if word in ("&&", "|", ";"):
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]
            if words:
                yield words[: words.index(">")] if ">" in words else words
            words = []
        elif word != "...":
            words.append(word)


class Parsed(BaseException):
    """A parser accepted the arguments of a command."""


class Wrong(Exception):
    """A command of the documents cannot be typed as it stands there."""


@pytest.fixture
def check(monkeypatch, tmp_path, capsys) -> Callable[[str], None]:
    """A function that raises `Wrong` for a command line that would not be accepted."""
    for folder in ("configs", "docs", "examples", "launch", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "my-model.yaml").write_text((ROOT / "configs/model/tiny.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    before = dict(os.environ)
    _stop_after_parsing(monkeypatch)

    def check_line(line: str) -> None:
        try:
            for words in commands(line):
                _check(words, monkeypatch)
        except SystemExit as end:
            if end.code not in (0, None):  # else --help or --print_config
                raise Wrong(f"{line}: {capsys.readouterr().err[-2000:]}") from None

    yield check_line
    os.environ.clear()
    os.environ.update(before)


def _stop_after_parsing(monkeypatch) -> None:
    """Let the outermost `parse_args` raise `Parsed` instead of returning."""
    depth = 0

    def stopping(original: Callable) -> Callable:
        @functools.wraps(original)
        def parse_args(self, *args, **kwargs):
            nonlocal depth
            depth += 1
            try:
                found = original(self, *args, **kwargs)
            finally:
                depth -= 1
            if depth:
                return found
            raise Parsed

        return parse_args

    for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
        monkeypatch.setattr(parser, "parse_args", stopping(parser.parse_args))


def _check(words: list[str], monkeypatch) -> None:
    words = [re.sub(r"^[A-Z]$", "1", word) for word in words]  # N, F: some number
    for word in words:
        path = OURS.match(word)
        if path and not (ROOT / path[0]).exists():
            raise Wrong(f"{path[0]} does not exist")
    for option, value in itertools.pairwise(words):
        if option == "--config" and not Path(value).exists():  # a reader's own
            Path(value).parent.mkdir(parents=True, exist_ok=True)
            Path(value).write_text("{}\n")
    match words:
        case ["pytest", *rest] | ["python", "-m", "pytest", *rest]:
            _check_pytest(rest)
        case ["sh", script, *rest]:
            _check_shell(script, rest)
        case ["make", target]:
            if f"\n{target}:" not in (ROOT / "Makefile").read_text():
                raise Wrong(f"make {target}: no such target")
        case ["python", "-m", module, *rest]:
            if find_spec(module) is None:
                raise Wrong(f"no module {module}")
            if not rest:  # the name of a command in a sentence
                return
            _start(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True), [module, *rest], monkeypatch)
        case ["python" | "torchrun" | "deepspeed" | "srun" | "mpirun", *_]:
            _check_launched(words, monkeypatch)
        case ["docker", *_] if "run" in words:
            _check_in_container(words, monkeypatch)
        case ["sbatch", *_] if (script := "launch/slurm/train.sbatch") in words:  # what follows is train.py's
            _check_launched(["python", "launch/train.py", *words[words.index(script) + 1 :]], monkeypatch)
        case ["bash", "launch/slurm/prepare.sbatch", *rest]:
            _check(["python", "-m", "data_pipeline.prepare", *rest[rest.index("--") + 1 :]], monkeypatch)
        case [first, *_] if first.rpartition("/")[2] not in UNCHECKED:
            raise Wrong(f"{first}: not known to this test")


def _check_launched(words: list[str], monkeypatch) -> None:
    """A script of the project, under a launcher."""
    scripts = [index for index, word in enumerate(words) if word.endswith(".py")]
    if scripts:
        script, rest = words[scripts[0]], words[scripts[0] + 1 :]
        if script != "-":
            _start(lambda: runpy.run_path(str(ROOT / script), run_name="__main__"), [script, *rest], monkeypatch)
    options = [word.split("=")[0] for word in words[: scripts[0] if scripts else None] if word.startswith("--")]
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        known = get_args_parser().format_help()
    elif words[0] == "deepspeed":  # by its text: importing it takes seconds
        known = (Path(find_spec("deepspeed").origin).parent / "launcher/runner.py").read_text()
    else:
        return
    for option in options:
        if not re.search(rf"{re.escape(option)}(?![\w-])", known):
            raise Wrong(f"{words[0]} has no option {option}")


def _check_in_container(words: list[str], monkeypatch) -> None:
    """What follows the image, or Compose's service: options of train.py, or a command (docker/entrypoint.sh)."""
    at = next((index for index, word in enumerate(words) if word.startswith(("gptoss_dist:", "train"))), None)
    if at is None:
        raise Wrong("docker run: no image of this project")
    rest = [word.removeprefix("/opt/gptoss_dist/") for word in words[at + 1 :]]
    if rest:
        _check(["python", "launch/train.py", *rest] if rest[0].startswith("-") else rest, monkeypatch)


def _start(run: Callable, argv: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    _accepts(run)


def _accepts(run: Callable) -> None:
    try:
        run()
    except Parsed:
        return
    raise Wrong("it ran without asking a parser")


def _check_shell(script: str, arguments: list[str]) -> None:
    """Options of the project's shell scripts are in their text; what test.sh does not know is pytest's."""
    text = (ROOT / script).read_text()
    others = [word for word in arguments if not re.search(rf"(?<!\w){re.escape(word.split('=')[0])}(?![\w-])", text)]
    options = [word for word in others if word.startswith("-")]
    if script.endswith("test.sh"):
        _check_pytest(others)
    elif options:
        raise Wrong(f"{script} has no {options[0]}")


def _check_pytest(arguments: list[str]) -> None:
    """Paths exist, markers are registered, words of -k are in the name of a file or a test under the paths."""
    paths, words, markers, previous = [], "", "", ""
    for word in arguments:
        if previous == "-k":
            words = word
        elif previous == "-m":
            markers = word
        elif word.startswith("-"):
            if not re.search(rf"(^|[\s,]){re.escape(word.split('=')[0])}[\s,=]", _pytest_help()):
                raise Wrong(f"pytest has no option {word}")
        elif not (ROOT / word.split("::")[0]).exists():
            raise Wrong(f"pytest: {word} does not exist")
        else:
            paths.append(ROOT / word.split("::")[0])
        previous = word
    names = "".join(_names(file) for path in paths or [ROOT / "tests"] for file in _test_files(path)).lower()
    for word in re.findall(r"\w+", words):
        if word not in ("and", "or", "not") and word.lower() not in names:
            raise Wrong(f"pytest -k {word}: no such test")
    for marker in re.findall(r"\w+", markers):
        if marker not in ("and", "or", "not") and f'"{marker}:' not in (ROOT / "pyproject.toml").read_text():
            raise Wrong(f"pytest -m {marker}: no such marker")


def _test_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("test_*.py"))


def _names(file: Path) -> str:
    """What -k looks at: the file and the functions of tests."""
    return " ".join([str(file.relative_to(ROOT)), *re.findall(r"def (test_\w+)", file.read_text()), ""])


@functools.cache
def _pytest_help() -> str:
    done = subprocess.run([sys.executable, "-m", "pytest", "--help"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout


@pytest.mark.parametrize(("document", "line"), lines())
def test_commands_of_the_documents_parse(check, document, line):
    check(line)


@pytest.mark.parametrize(
    "line",
    [
        "python launch/train.py --config configs/quickstart.yaml --train.stepz 3",
        "python launch/train.py --config configs/quickstart.yaml --train.steps three",
        "python launch/train.py --config configs/quickstarts.yaml",
        "torchrun --standalone --nprocs_per_node 2 launch/train.py --config configs/quickstart.yaml",
        "torchrun --standalone --nproc_per_node 2 launch/trains.py",
        "deepspeed --num_gpu_s 2 launch/train.py --config configs/quickstart.yaml",
        "python -m data_pipeline.prepare pystdlib --output data/x --wrokers 8",
        "bash launch/slurm/prepare.sbatch --array=0-3 -- pystdlib --outputs data/x",
        "python -m data_pipeline.verifies data/x",
        "python -m data_pipeline.verify data/x && python -m data_pipeline.verify data/x --wrokers 2",
        "python launch/convert.py exports runs/mine --output x",
        "python launch/generate.py --checkpoint runs/mine --promt x",
        "sh launch/install.sh --extra test",
        "pytest tests/models",
        "pytest tests -k there_is_no_such_test",
        "pytest tests -m there_is_no_such_marker",
        "make tset",
        "docker run --rm gptoss_dist:cpu --config configs/quickstart.yaml --train.stepz 3",
        "docker run --rm gptoss_dist:cpu python -m data_pipeline.prepare pystdlib --outputs data/x",
        "docker compose -f docker/compose.yaml run --rm train --config configs/quickstarts.yaml",
        "trains.py",
    ],
)
def test_a_mistake_in_a_document_would_be_found(check, line):
    with pytest.raises(Wrong):
        check(line)


def test_links_between_documents_exist():
    wrong = []
    for path in [*DOCUMENTS, ROOT / "docs/log.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if "://" not in target and not (path.parent / target).exists():
                wrong.append(f"{path.relative_to(ROOT)}: {target}")
    assert not wrong


def test_files_that_the_documents_name_exist():
    """Such as `train/loop.py`: from the root, from a package, or from the documents."""
    folders = [ROOT, ROOT / "gptoss_dist", ROOT / "data_pipeline", ROOT / "docs"]
    wrong = []
    for path in [*DOCUMENTS, ROOT / "CHANGELOG.md"]:
        for name in re.findall(r"`([\w/.-]+/[\w.-]+\.(?:py|sh|md|yaml|json|h))`", path.read_text()):
            if not name.startswith(("runs/", "data/")) and not any((folder / name).exists() for folder in folders):
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert not wrong


def test_stations_of_a_batch_exist():
    text = (ROOT / "docs/life_of_a_batch.md").read_text()
    stations = re.findall(r"^\|[^|]+\| `([^`]+)` \| `([^`]+)` \|$", text, re.MULTILINE)
    assert len(stations) > 30
    wrong = [
        (file, name)
        for file, name in stations
        if not re.search(rf"^ *(def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE)
    ]
    assert not wrong


def test_the_picture_of_the_rooms_is_of_the_rooms():
    drawing = runpy.run_path(str(ROOT / "docs/images/draw_rooms.py"))
    assert (ROOT / "docs/images/rooms.svg").read_text() == drawing["svg"](), "run python docs/images/draw_rooms.py"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_pages_have_their_shape(path):
    """A heading and soon a command or a table; paragraphs of at most five lines, cells of at most one."""
    text = re.sub(r"```.*?```", "```", path.read_text(), flags=re.DOTALL)
    blocks = [block.splitlines() for block in re.split(r"\n\s*\n|(?m:^)(?=[-*] |\d+\. )", text) if block.strip()]
    assert text.startswith("# ")
    assert not [block[0] for block in blocks if len(block) > 5 and not block[0].startswith(("|", "```"))]
    assert not [line for block in blocks for line in block if line.startswith("|") and len(line) > 130]
