"""On a real SLURM of two nodes: jobs that are asked to stop, in each of the ways, go on where they were."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.slurm.lab import Lab, newest_step
from tests.support.ranks import losses
from tests.support.tracked import history, runs_of

pytestmark = [pytest.mark.distributed, pytest.mark.slurm]


@pytest.fixture
def tiny(settings, tmp_path) -> Path:
    """Settings of a run of 120 steps that saves only at the end, or when it is asked to stop."""
    values = yaml.safe_load(settings.read_text())
    values["train"] |= {"steps": 120, "gradient_accumulation": 4}
    values["checkpoint"] = {"every": 0}
    values["validation"] = {"every": 0}
    del values["run"]["dir"]
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def assert_whole(run: Path, steps: int) -> None:
    """Each step is in metrics.jsonl exactly once, in order: none is lost, and none was trained twice."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    written = [row["step"] for row in rows if "loss/train" in row.get("metrics", {})]
    assert written == list(range(1, steps + 1))
    assert sorted(losses(run)) == written
    assert (run / "DONE").exists() and not (run / "STOP").exists() and not (run / "STOPPED").exists()


def starts_of(run: Path) -> list[tuple[str, int, int]]:
    """(job, number, step) of each start."""
    lines = [line.split() for line in (run / "starts.txt").read_text().splitlines()]
    return [(job, int(number), int(step)) for job, number, step, *_ in lines]


def test_torchrun_on_two_nodes_goes_on_after_each_request_to_stop(lab: Lab, tiny, tmp_path):
    """`scancel --signal=USR1` to the steps, SIGTERM of a preemption, and a file STOP; MLflow has each step once too."""
    mlflow = pytest.importorskip("mlflow")
    run, uri = tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracking = ["--tracking.mlflow", "true", "--tracking.uri", uri, "--tracking.experiment", "tests"]
    job = lab.train("--config", tiny, "--run.dir", run, *tracking)

    lab.await_step(run, 5)
    lab("scancel", "--signal=USR1", job)
    lab.await_restart(run, job, 1)
    lab.await_step(run, newest_step(run) + 5)

    whole = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "true")
    other = lab("sbatch", "--parsable", *whole).strip()
    lab.await_end(other, "COMPLETED")
    lab.await_restart(run, job, 2)
    lab.await_step(run, newest_step(run) + 5)

    (run / "STOP").touch()
    lab.await_restart(run, job, 3)
    lab.await_end(job, "COMPLETED")

    starts = starts_of(run)
    assert [(name, number) for name, number, _ in starts] == [(job, number) for number in range(4)]
    assert 0 == starts[0][2] < starts[1][2] < starts[2][2] < starts[3][2] < 120
    assert_whole(run, 120)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (recorded,) = runs_of(client)
    assert [step for step, _ in history(client, recorded.info.run_id, "loss/train")] == list(range(1, 121))
    assert recorded.info.status == "FINISHED"
    assert "2 processes, fsdp" in (run / "log.txt").read_text()


@pytest.mark.slow
def test_deepspeed_on_two_nodes_is_signalled_before_the_time_limit(lab: Lab, tiny, tmp_path):
    """The limit is two minutes, and the run takes longer, as its end is far away; it requeues itself before that."""
    run = tmp_path / "run"
    options = ("--time=2", "--signal=B:USR1@60")
    job = lab.train("--config", tiny, "--run.dir", run, "--train.steps", "100000", sbatch=options, LAUNCHER="deepspeed")
    lab.await_restart(run, job, 1)  # nobody but SLURM has asked it to stop
    text = lab.log_of(job)
    assert "asked to stop: writing" in text and "requeue at step" in text and "TIME LIMIT" not in text
    (_, (_, _, step)) = starts_of(run)
    lab.await_step(run, step + 3)
    assert sorted(losses(run)) == list(range(1, newest_step(run) + 1))
    assert "2 processes, deepspeed" in (run / "log.txt").read_text()

    # A job that is cancelled saves too, and is not requeued.
    lab("scancel", job)
    lab.await_end(job, "CANCELLED")
    assert "ended with code" in lab.log_of(job) and len(starts_of(run)) == 2


@pytest.mark.slow
def test_elements_of_an_array_requeue_themselves_alone(lab: Lab, tiny, tmp_path):
    """Submitted by submit.py, with another learning rate each; in MLflow they are nested below one run."""
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    said = lab(
        *shlex.split(
            f"python launch/submit.py --config {tiny} --run.dir {tmp_path / 'lr'} "
            "--nodes 1 --gpus-per-node 1 --array optim.lr=3e-3,1e-3 --time 10 --tracking.mlflow true "
            f"--tracking.uri {uri} --tracking.experiment tests --train.steps 300"
        ),
    )
    (job,) = re.findall(r"submitted job (\d+);", said)
    runs = [tmp_path / "lr-0", tmp_path / "lr-1"]
    for number in (1, 0):  # of the last element, SLURM_JOB_ID is the id of the whole array
        lab.await_step(runs[number], 3)
        lab("scancel", "--batch", "--signal=USR1", f"{job}_{number}")
    for number in (1, 0):
        lab.await_restart(runs[number], f"{job}_{number}", 1)
    lab.await_end(job, "COMPLETED")

    for number, run in enumerate(runs):
        assert [(name, start) for name, start, _ in starts_of(run)] == [(f"{job}_{number}", 0), (f"{job}_{number}", 1)]
        assert_whole(run, 300)
    client = mlflow.MlflowClient(tracking_uri=uri)
    recorded = runs_of(client)
    (parent,) = [each.info.run_id for each in recorded if "sweep" in each.data.tags]
    children = [each for each in recorded if each.data.tags.get("mlflow.parentRunId") == parent]
    assert sorted(float(each.data.params["optim.lr"]) for each in children) == [1e-3, 3e-3] and len(recorded) == 3
    kept = tmp_path / "lr" / "job" / "1"
    assert {"job.sbatch", "0.yaml", "1.yaml", "revision.txt"} <= {path.name for path in kept.iterdir()}


@pytest.mark.slow
def test_a_job_goes_on_after_the_daemon_of_a_node_was_killed(lab: Lab, tiny, tmp_path):
    """SLURM requeues it itself once it misses the node; the job waits until the node is back."""
    run = tmp_path / "run"
    job = lab.train("--config", tiny, "--run.dir", run, "--checkpoint.every", "5", "--train.steps", "100000")
    lab.await_step(run, 8)
    lab.kill_node("node2")
    lab.await_(lambda: lab.states(job) == ["PENDING"], f"requeue of job {job}")
    lab.start_node("node2")
    lab.await_restart(run, job, 1)
    (_, (_, _, step)) = starts_of(run)
    lab.await_step(run, step + 3)
    assert step >= 5 and sorted(losses(run)) == list(range(1, newest_step(run) + 1))
    lab("scancel", job)
    lab.await_end(job, "CANCELLED")
