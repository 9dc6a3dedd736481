"""The benchmarks' commands start, and their common protocol counts as it says."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.benchmarks.protocol import QUICKSTART, Spread, run_worker

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.mark.parametrize("command", ["benchmark", "benchmark_checkpoints", "benchmark_data", "benchmark_engines"])
def test_commands_start_from_any_folder(tmp_path, command):
    line = [sys.executable, LAUNCH / f"{command}.py", "--help"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr


def test_medians_are_given_with_what_was_seen():
    assert f"{Spread.of([3.0, 1.0, 2.0, 9.0]):.1f}" == "2.5 (1.0 to 9.0)"
    ratio = Spread.of_ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert ratio == Spread(median=2.0, least=1.0, most=3.0) and ratio.range(".0f") == "1 to 3"
    with pytest.raises(ValueError, match="zip"):
        Spread.of_ratios([1.0], [1.0, 2.0])
    assert QUICKSTART.is_file()


def test_what_a_worker_found_is_on_its_last_line():
    program = "import sys; print('a line'); print('{\"seconds\": 2}'); print('a warning', file=sys.stderr)"
    assert run_worker("x", [sys.executable, "-c", program]) == {"seconds": 2}
    with pytest.raises(SystemExit, match=r"(?s)x failed:.*no such thing"):
        run_worker("x", [sys.executable, "-c", "raise ValueError('no such thing')"])
