"""launch/install.sh: which index each package is asked of, with stand-ins for Python and uv."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("sh", "cat", "chmod", "cksum", "cp", "dirname", "grep", "head", "paste", "sed", "sort", "tr")
PYTHON = """#!/bin/sh
case "$*" in
    "-m pip config list") printf "%s\\n" ":env:.index-url='$PIP_INDEX_URL'" \\
        "global.extra-index-url='https://b/ https://c/'" ;;
    "-m pip --version") ;;
    *"import sys; sys.exit"*) ;;
    *importlib.metadata*) exit 1 ;;
    "-m pip install"*" uv") cp "$UV" "${0%/*}/uv" ;;
    "-m pip install"*+cpu) exit 1 ;;
    "-m pip install"*) ;;
    *) echo "unexpected: $*"; exit 1 ;;
esac
"""
UV = """#!/bin/sh
echo "$* index=$UV_DEFAULT_INDEX further=$UV_INDEX strategy=$UV_INDEX_STRATEGY"
case "$*" in *torch==*) exit 1 ;; esac
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with install.sh, a virtual environment of stand-ins, and a path with neither uv nor a GPU."""
    (tmp_path / "launch").mkdir()
    for name in ("install.sh", "constraints.txt"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch")
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for path, text in (("venv/bin/python", PYTHON), ("stand-in/uv", UV)):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)
    (tmp_path / "path").mkdir()
    for name in TOOLS:
        (tmp_path / "path" / name).symlink_to(shutil.which(name))
    return tmp_path


def install(folder: Path, path: Path) -> list[str]:
    """Return what is printed until uv, which fails, was asked for a torch."""
    environment = {
        "PATH": str(path),
        "UV": str(folder / "stand-in/uv"),
        "PIP_INDEX_URL": "https://a.example.org/simple",
    }
    line = ["sh", str(folder / "launch/install.sh"), "--venv", str(folder / "venv")]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no CPU build of torch==" in done.stderr, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("uv_is_there", [False, True])
def test_uv_is_given_the_indexes_of_pip_also_where_it_was_not_there(folder, uv_is_there):
    if uv_is_there:
        (folder / "path/uv").symlink_to(folder / "stand-in/uv")
    asked = [line for line in install(folder, folder / "path") if line.startswith("pip install")]
    assert len(asked) == (3 if uv_is_there else 1) and "--torch-backend cpu" in asked[-1]
    indexes = "index=https://a.example.org/simple further=https://b/ https://c/ strategy=unsafe-best-match"
    assert all(line.endswith(indexes) for line in asked), asked
