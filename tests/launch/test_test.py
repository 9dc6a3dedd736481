"""launch/test.sh: what it exits with and prints, with stand-ins for the installation and for pytest."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path):
    """A folder with test.sh whose pytest prints its arguments and fails if they hold the text in `FAILING`."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch/test.sh", tmp_path / "launch")
    (tmp_path / "launch/install.sh").write_text("exit 0\n")
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "ran $*"\ncase "$*" in *"$FAILING"*) exit 3 ;; esac\n')
    python.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    "failing", ["neither", "(distributed) and not slow tests/slurm", "--ignore", "or not", "slow tests/engine", "-m"]
)
def test_every_part_decides(project, failing):
    environment = {"VIRTUAL_ENV": str(project / "venv"), "FAILING": failing, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["sh", "launch/test.sh"], cwd=project, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == (0 if failing == "neither" else 3), done.stdout + done.stderr
    # What runs beside the others is reported after them.
    assert done.stdout.splitlines() == [
        "ran -m pytest -m ((compiled or not distributed) and not (slurm or netns)) and not slow",
        "ran -m pytest -m (distributed and not compiled) and not slow tests/engine",
        "ran -m pytest -m (distributed) and not slow tests/slurm tests/netns tests/distributed",
        "ran -m pytest -m (distributed and not compiled) and not slow --ignore tests/engine --ignore tests/slurm "
        "--ignore tests/netns --ignore tests/distributed",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_all_parts(project, number):
    """They run in the background, where a shell lets SIGINT be ignored."""
    (project / "venv/bin/python").write_text('#!/bin/sh\necho $$ >>"$SEEN"\nexec sleep 60\n')
    seen = project / "seen"
    environment = {
        "VIRTUAL_ENV": str(project / "venv"),
        "SEEN": str(seen),
        "PATH": "/usr/bin:/bin",
        "TMPDIR": str(project),
    }
    process = subprocess.Popen(["sh", "launch/test.sh"], cwd=project, env=environment, start_new_session=True)
    while not seen.exists() or len(seen.read_text().splitlines()) < 3:
        time.sleep(0.01)
    os.kill(process.pid, number)
    assert process.wait(20) == 130
    for started in map(int, seen.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(started, 0)
    assert not list(project.glob("tmp.*"))


def test_fast_uses_all_cores(project):
    environment = {"VIRTUAL_ENV": str(project / "venv"), "FAILING": "neither", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["sh", "launch/test.sh", "--fast", "-x"], cwd=project, env=environment, capture_output=True, text=True
    )
    spread = f"-n {len(os.sched_getaffinity(0))} --dist worksteal -m not (slow or distributed or compiled or heavy)"
    assert (done.returncode, done.stdout) == (0, f"ran -m pytest {spread} -x\n")


def test_arguments_run_one_pytest(project):
    environment = {"VIRTUAL_ENV": str(project / "venv"), "FAILING": "-k rope", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["sh", "launch/test.sh", "tests/model", "-k", "rope"], cwd=project, env=environment, capture_output=True
    )
    assert (done.returncode, done.stdout) == (3, b"ran -m pytest tests/model -k rope\n")
