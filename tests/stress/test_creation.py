"""SIGKILL while a run makes something for the first time: its lock, its database, its first checkpoint.

Started again, the run ends as the one that nobody killed, MLflow has every step, nothing is left of what was on its
way, and files of others in the same folders are as they were. KILLS=60 pytest tests/stress -k creation kills sixty
times.
"""

import os
import random
import re
import shlex
import signal
import time
from pathlib import Path

import pytest

from gptoss_dist.tracking.tracker import sync
from tests.support.ranks import losses, run, start

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MOMENTS = {
    "lock": "run/.lock",
    "settings": "run/config.yaml",
    "metrics": "run/metrics.jsonl",
    "database": "*mlflow.db*",
    "first checkpoint": "run/checkpoints/step_*",
}
"""What appears, in the working directory, before the kill."""
KILLS = max(1, int(os.environ.get("KILLS", "5")) // len(MOMENTS))
"""Of each moment."""
FOREIGN = ("mlflow.tmp", "mlflow.db.tmp", "run/notes.txt", "run/.run.tmp-mine", "run/checkpoints/step_mine.tmp/weights")


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_it_creates_something(settings, tmp_path, moment):
    draw, kills = random.Random(moment), 0
    options = shlex.split(
        f"--config {settings} --run.dir run --train.deterministic true --resume auto --tracking.mlflow true "
        "--tracking.uri sqlite:///mlflow.db"
    )
    whole = tmp_path / "whole"
    whole.mkdir()
    run("launch/train.py", *options, cwd=whole)
    assert steps_in_mlflow(whole) == list(range(1, 13))
    for number in range(KILLS):
        here = tmp_path / str(number)
        for name in FOREIGN:
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_text("mine")
        process, deadline = start("launch/train.py", *options, cwd=here), time.time() + 240
        while process.is_running() and not appeared(here, MOMENTS[moment]):
            assert time.time() < deadline
            time.sleep(0.0005)
        time.sleep(draw.random() * draw.choice([0.002, 0.05, 1.0]))
        process.send(signal.SIGKILL)
        kills += process.wait().returncode != 0
        run("launch/train.py", *options, cwd=here)
        assert losses(here / "run") == losses(whole / "run") and len(losses(whole / "run")) == 12
        assert steps_in_mlflow(here) == list(range(1, 13))
        assert all((here / name).read_text() == "mine" for name in FOREIGN)
        assert names(here) == names(whole) | set(FOREIGN)
    print(f"{kills} kills at the making of {moment}")


def appeared(here: Path, pattern: str) -> bool:
    return any(path.name not in FOREIGN and path.name != "step_mine.tmp" for path in here.glob(pattern))


def steps_in_mlflow(here: Path) -> list[int]:
    from mlflow import MlflowClient

    sync(here / "run", f"sqlite:///{here / 'mlflow.db'}")  # a busy machine may not be done when the run ends
    client = MlflowClient(f"sqlite:///{here / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    runs = client.search_runs([experiment.experiment_id])  # one that began again at step 0 is a new run there
    (found,) = [run for run in runs if run.info.status == "FINISHED"]
    # A step that was taken again after the kill is there twice, at two times.
    return sorted({metric.step for metric in client.get_metric_history(found.info.run_id, "loss/train")})


def names(here: Path) -> set[str]:
    """Return the paths of all files, but for MLflow's artifacts and what a run that begins again sets aside."""
    found = {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()}
    aside = re.compile(r"run/(metrics|expert_tokens|tracking)\.1\b")
    return {name for name in found if not name.startswith("mlartifacts/") and not aside.match(name)}
