"""The import rule of docs/design.md: launch -> train -> engine -> parallel -> model -> ops."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# What each room may import of this project.
ALLOWED = {
    "data_pipeline": set(),
    "gptoss_dist.ops": set(),
    "gptoss_dist.model": {"ops", "inference"},  # GptOss.generate is the one call upward, at run time
    "gptoss_dist.inference": {"model", "ops", "checkpoint", "data_pipeline"},
    "gptoss_dist.checkpoint": {"parallel", "model", "ops", "data_pipeline"},
    "gptoss_dist.parallel": {"model", "ops", "config"},
    "gptoss_dist.engine": {"parallel", "model", "ops", "config", "checkpoint"},
    "gptoss_dist.train": {
        "engine", "parallel", "model", "ops", "config", "checkpoint", "inference", "data_pipeline"
    },
}  # fmt: skip


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".") for name in names)


def test_imports_point_down():
    wrong, seen = [], 0
    for room, allowed in ALLOWED.items():
        own = room.split(".")[-1]
        for path in (ROOT / room.replace(".", "/")).rglob("*.py"):
            for parts in imports(path):
                seen += 1
                if parts[0] == "gptoss_dist" and len(parts) > 1:
                    target = parts[1]
                elif parts[0] in ("data_pipeline", "launch"):
                    target = parts[0]
                else:
                    continue
                if target not in allowed | {own}:
                    wrong.append(f"{path.relative_to(ROOT)} imports {'.'.join(parts)}")
    assert seen > 100
    assert not wrong, wrong


def test_the_model_knows_nothing_of_ranks():
    for room in ("model", "ops"):
        for path in (ROOT / "gptoss_dist" / room).rglob("*.py"):
            assert not any(parts[:2] == ["torch", "distributed"] for parts in imports(path)), path


def test_files_are_readable_in_one_sitting():
    long = {
        str(path.relative_to(ROOT)): count
        for folder in ("gptoss_dist", "data_pipeline", "launch")
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 500
    }
    assert not long


def test_pytest_finds_the_packages_without_python_m():
    """A folder `tests/data_pipeline` is found before an editable install, unless the root is on the path."""
    pytest = shutil.which("pytest", path=Path(sys.executable).parent) or shutil.which("pytest")
    done = subprocess.run(
        [pytest, "-q", "--collect-only", "tests/data_pipeline/test_tokenizer.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
