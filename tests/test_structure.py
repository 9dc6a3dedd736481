"""The house rules of docs/design.md: imports point down, no circles, nothing too long to read, no crowded folders."""

import ast
import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_pipeline", "gptoss_dist", "launch")

# Rooms from the bottom to the top. A room imports rooms below it, and rooms beside it as long as no circle arises.
LEVELS = (
    {"data_pipeline", "ops", "distributed"},
    {"model", "config"},
    {"parallel", "checkpoint", "cluster"},
    {"engine", "inference"},
    {"tracking", "planner", "evaluation"},
    {"train"},
    {"launch"},
)
ONLY = {
    "ops": set(),
    "distributed": set(),
    "data_pipeline": set(),
    "cluster": {"config", "distributed", "data_pipeline"},
}
"""Rooms that may import these and no others, whatever their level."""
WITHOUT_RANKS = ("data_pipeline", "gptoss_dist/ops", "gptoss_dist/model")

MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 500, 60
FEWEST_FILES, MOST_FILES = 3, 12
LONG_FUNCTIONS: dict[str, str] = {}
"""FILE:FUNCTION, and why it is longer than the others may be."""
DURABLE = {
    "os": {"fdatasync", "fsync", "link", "rename", "renames", "replace"},
    "fcntl": {"flock", "lockf"},
    "tempfile": {"mkdtemp", "mkstemp"},
    "shutil": {"move"},
}


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Every module of the project by its dotted name."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {dotted(path): ast.parse(path.read_text()) for path in paths}


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(name: str) -> Iterator[str]:
    """Dotted names that a module imports, anywhere in it; of `from a import b` both `a` and `a.b`."""
    for node in ast.walk(sources()[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str:
    """`gptoss_dist.model.rope` is in `model`, `data_pipeline.disk` in `data_pipeline`."""
    parts = name.split(".")
    return parts[1] if parts[0] == "gptoss_dist" and len(parts) > 1 else parts[0]


def arrows() -> set[tuple[str, str]]:
    """(importer, imported) modules of the project; a package that is only on the way to a module is not imported."""
    modules = sources()
    found = set()
    for name in modules:
        wanted = [target for target in imports(name) if target in modules and target != name]
        found |= {(name, t) for t in wanted if not any(other.startswith(f"{t}.") for other in wanted)}
    return found


def circle(graph: set[tuple[str, str]]) -> list[str]:
    """Some circle of a graph as the list of its nodes, or nothing."""
    after: dict[str, list[str]] = {}
    for start, end in sorted(graph):
        after.setdefault(start, []).append(end)
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for following in after.get(node, ()):
                if found := visit(following, [*path, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(after) if (found := visit(node, []))), [])


def test_imports_point_down():
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    assert len(arrows()) > 200
    wrong = [
        f"{importer} imports {imported}"
        for importer, imported in sorted(arrows())
        if (a := room(importer)) != (b := room(imported)) and "gptoss_dist" not in (a, b)
        if level[b] > level[a] or (a in ONLY and b not in ONLY[a])
    ]
    assert not wrong


def test_no_circles():
    assert not circle(arrows())
    rooms = {(room(a), room(b)) for a, b in arrows() if room(a) != room(b)}
    assert not circle({(a, b) for a, b in rooms if "gptoss_dist" not in (a, b)})
    folders = {(a.rpartition(".")[0], b.rpartition(".")[0]) for a, b in arrows()}
    # A package's own `__init__` and thin command modules import downwards from the folder above.
    inner = {(a, b) for a, b in folders if a != b and not b.startswith(f"{a}.") and not a.startswith(f"{b}.")}
    assert not circle(inner)


def test_a_circle_would_be_found():
    assert circle({("a", "b"), ("b", "c"), ("c", "b"), ("x", "a")}) == ["b", "c", "b"]
    assert not circle({("a", "b"), ("a", "c"), ("b", "c")})


@pytest.mark.parametrize("folder", WITHOUT_RANKS)
def test_these_rooms_know_nothing_of_ranks(folder):
    names = [name for name in sources() if name.startswith(folder.replace("/", "."))]
    wrong = [name for name in names for target in imports(name) if target.startswith("torch.distributed")]
    assert len(names) > 3 and not wrong


def test_files_are_readable_in_one_sitting():
    paths = [*files("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    counts = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in paths}
    assert not {path: count for path, count in counts.items() if count > MOST_LINES_OF_A_FILE}


def test_the_formatter_has_the_last_word():
    pragmas = [f"fmt: {word}" for word in ("skip", "off")]
    paths = [*files("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    assert not [path for path in paths if any(pragma in path.read_text() for pragma in pragmas)]


def test_functions_are_readable_at_a_glance():
    long = {}
    for name, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > MOST_LINES_OF_A_FUNCTION:
                    long[f"{name}:{node.name}"] = length
    assert not {name: length for name, length in long.items() if name not in LONG_FUNCTIONS}
    assert set(LONG_FUNCTIONS) <= set(long), "an exception that is no longer needed"


def durable_calls(tree: ast.Module) -> Iterator[str]:
    """What a module does by itself that `data_pipeline/disk.py` does for all: renames, links, flushes, locks."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{a.name}" for a in node.names if a.name in DURABLE.get(node.module, ()))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = aliases.get(node.value.id)
            if node.attr in DURABLE.get(module, ()):
                yield f"{module}.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            # Of all that is called `replace`, only a path's takes one argument without a name.
            is_replace = node.func.attr == "replace" and len(node.args) == 1 and not node.keywords
            if node.func.attr in ("rename", "hardlink_to") or is_replace:
                yield f"Path.{node.func.attr}"


def test_what_is_durable_goes_through_disk():
    found = {name: sorted(set(durable_calls(tree))) for name, tree in sources().items()}
    assert "os.fsync" in found.pop("data_pipeline.disk")
    assert not {name: calls for name, calls in found.items() if calls}


@pytest.mark.parametrize(
    "line, call",
    [
        ("from os import replace", "os.replace"),
        ("import os as o; o.fsync(1)", "os.fsync"),
        ("from fcntl import flock as hold", "fcntl.flock"),
        ("import tempfile; make = tempfile.mkdtemp", "tempfile.mkdtemp"),
        ("path.with_suffix('.x').rename(path)", "Path.rename"),
        ("path.replace(other)", "Path.replace"),
    ],
)
def test_other_ways_to_disk_would_be_found(line, call):
    assert list(durable_calls(ast.parse(line))) == [call]
    harmless = "import os; os.listdir('.'); 'a'.replace('a', 'b'); replace(x, y=1); dataclasses.replace(x, y=1)"
    assert not list(durable_calls(ast.parse(harmless)))


READ_ELSEWHERE = {"data_pipeline.corpora.records", "gptoss_dist.tracking.jsonl"}
"""Modules that read lines of JSON as they come, of which a damaged one is counted and passed over."""


def readings(tree: ast.Module) -> Iterator[str]:
    """Calls that read JSON or YAML from disk past `data_pipeline.foreign`, which has the limits."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name = ast.unparse(node.func)
        given = "".join(map(ast.unparse, node.args))
        if name in ("json.load", "yaml.load", "yaml.safe_load", "yaml.full_load", "msgspec.json.decode") or (
            name in ("json.loads", "orjson.loads") and any(word in given for word in ("read_", "open(", ".read("))
        ):
            yield name


def test_json_and_yaml_from_disk_go_through_one_reader():
    found = {name: sorted(readings(tree)) for name, tree in sources().items() if "benchmarks" not in name}
    assert "yaml.load" in found.pop("data_pipeline.foreign.parsing")
    assert not {name: calls for name, calls in found.items() if calls and name not in READ_ELSEWHERE}


@pytest.mark.parametrize("line", ["json.load(file)", "json.loads(path.read_text())", "yaml.safe_load(open(path))"])
def test_another_reader_would_be_found(line):
    assert list(readings(ast.parse(line)))
    assert not list(readings(ast.parse("json.loads(json.dumps(x)); json.loads(line)")))


def test_folders_are_neither_crowded_nor_empty():
    counts = {}
    for path in files("*.py"):
        counts[path.parent] = counts.get(path.parent, 0) + 1
    wrong = {str(f.relative_to(ROOT)): n for f, n in counts.items() if not FEWEST_FILES <= n <= MOST_FILES}
    assert not {folder: n for folder, n in wrong.items() if folder != "gptoss_dist"}  # it holds rooms


def files(pattern: str) -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob(pattern))]


@pytest.mark.distributed
def test_pytest_finds_the_packages_without_python_m():
    """A folder `tests/data_pipeline` is found before an editable install, unless the root is on the path."""
    pytest = shutil.which("pytest", path=Path(sys.executable).parent) or shutil.which("pytest")
    done = subprocess.run(
        [pytest, "-q", "--collect-only", "tests/data_pipeline/tokenizer/test_tokenizer.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
