"""What launch/slurm/job.sh decides, with commands in SLURM's place that say what SLURM would say."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.ownership import owned
from tests.support.ranks import ROOT

pytestmark = pytest.mark.distributed

SCRIPTS = [*sorted((ROOT / "launch/slurm").iterdir()), *sorted((ROOT / "tests/slurm").glob("*.sh"))]

# `srun` does what SRUN says in the run's folder; requeueing ends the script as SLURM ends it.
FAKES = {
    "srun": 'printf "%s\\n" "$@" >"$RUN/srun.txt"; env >"$RUN/environment.txt"; eval "$SRUN"',
    "squeue": 'echo "${STATE:-RUNNING}"',
    "scontrol": 'if [ "$1" = requeue ]; then echo "$2" >"$RUN/requeued.txt"; kill -TERM "$PPID"; else echo node7; fi',
    "apptainer": 'while [ "$1" != "$PYTHON" ]; do shift; done; exec "$@"',
}


@pytest.fixture
def job(tmp_path, settings):
    """A function that starts the script, with variables, and returns the process; the run's folder is job.run."""
    commands, run = tmp_path / "bin", tmp_path / "tiny"
    commands.mkdir()
    run.mkdir()
    for name, text in FAKES.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)

    def start(*words: str, **variables: str) -> subprocess.Popen:
        environment = {
            **os.environ,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "RUN": str(run),
            "PYTHON": sys.executable,
            "SLURM_JOB_ID": "44",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            **variables,
        }
        line = ["bash", str(ROOT / "launch/slurm/job.sh"), "--config", str(settings), *words]
        return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    start.run = run
    return start


def save(step: int) -> str:
    """What a run does that trains and saves: it has recorded its job first."""
    return (
        f"echo job 44 >$RUN/.launch; mkdir -p $RUN/checkpoints/step_{step:08d} $RUN/checkpoints/step_{step + 1:08d}.tmp"
    )


STOPPED, DONE, FAILED = "touch $RUN/STOPPED", "touch $RUN/DONE; exit 1", "exit 7"


@pytest.mark.parametrize(
    "srun, state, code, requeued",
    [
        (DONE, "RUNNING", 0, False),  # whatever the launcher's exit code
        (f"{save(4)}; {STOPPED}; exit 1", "RUNNING", 0, True),
        (f"{save(4)}; {STOPPED}", "COMPLETING", 143, False),  # cancelled: a requeue would undo that
        (f"{save(4)}; {FAILED}", "RUNNING", 0, True),
        (FAILED, "RUNNING", 7, False),  # such as a mistake of the user: the same would come again
        ("exit 0", "RUNNING", 1, False),  # neither done nor asked to stop
    ],
)
def test_files_decide_and_not_exit_codes(job, srun, state, code, requeued):
    process = job(SRUN=srun, STATE=state)
    text, _ = process.communicate(timeout=120)
    assert (process.returncode, (job.run / "requeued.txt").exists()) == (code, requeued), text
    if requeued:
        assert (job.run / "requeued.txt").read_text() == "44\n" and "requeue at step 4: it " in text


def test_a_signal_becomes_a_file_and_sigterm_ends_the_job(job):
    waits = f'while [ ! -e "$RUN/STOP" ]; do sleep 0.1; done; {save(4)}; {STOPPED}; sleep 1'
    process = job(SRUN=waits)
    await_file(job.run / "srun.txt")
    process.send_signal(signal.SIGUSR1)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and (job.run / "requeued.txt").exists(), text

    for name in ("srun.txt", "requeued.txt"):
        (job.run / name).unlink()
    process = job(SRUN=f"sleep 2; {STOPPED}", SLURM_RESTART_COUNT="1")
    await_file(job.run / "srun.txt")
    assert not (job.run / "STOP").exists() and not (job.run / "STOPPED").exists()  # the last start's
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 143 and not (job.run / "requeued.txt").exists(), text
    assert "--resume\nauto" in (job.run / "srun.txt").read_text()

    (job.run / ".launch").write_text(
        "job 43\n"
    )  # the checkpoints are not this job's: it did not get as far as to train
    process = job("--resume", "elsewhere", SRUN=DONE, SLURM_RESTART_COUNT="1")
    assert process.wait(120) == 0 and "auto" not in (job.run / "srun.txt").read_text()


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_starts_without_progress_are_counted(job):
    """Stopped three times at one step, by SLURM or on request, it is requeued no more; another job counts anew."""
    for restart, requeued in (("0", True), ("1", True), ("2", False)):
        (job.run / "requeued.txt").unlink(missing_ok=True)
        process = job(SRUN=STOPPED, SLURM_RESTART_COUNT=restart)
        text, _ = process.communicate(timeout=120)
        assert (job.run / "requeued.txt").exists() == requeued, text
    assert "3 starts in a row began at step 0: not requeued any more" in text and process.returncode == 1
    process = job(SRUN=STOPPED, SLURM_RESTART_COUNT="3")  # SLURM requeued it, after the loss of a node
    assert "not requeued any more" in process.communicate(timeout=120)[0] and process.returncode == 1
    process = job(SRUN=DONE, SLURM_JOB_ID="45")
    assert process.communicate(timeout=120) and process.returncode == 0


def test_elements_of_an_array_have_their_own_job_and_words(job):
    variables = {"SLURM_ARRAY_JOB_ID": "44", "SLURM_ARRAY_TASK_ID": "3"}
    process = job("--run.name", "sweep-%a", SRUN=f"{save(4)}; {STOPPED}", **variables)
    text, _ = process.communicate(timeout=120)
    assert (job.run / "requeued.txt").read_text() == "44_3\n", text
    assert "--run.name\nsweep-3\n" in (job.run / "srun.txt").read_text()


@pytest.mark.parametrize(
    "variables, words",
    [
        (
            {"SLURM_GPUS_ON_NODE": "8", "MAX_RESTARTS": "2"},
            "torch.distributed.run --nnodes 2 --nproc-per-node 8 --node-rank @NODE_RANK@ --master-addr node7 "
            "--master-port 10044 --max-restarts 2",
        ),
        (
            {"LAUNCHER": "deepspeed", "PROCESSES_PER_NODE": "4"},
            "deepspeed.launcher.runner --hostfile {run}/hosts-44 --no_ssh --node_rank @NODE_RANK@ --master_addr node7",
        ),
        (
            {"CONTAINER_RUNTIME": "apptainer", "CONTAINER_IMAGE": "my image.sif", "CONTAINER_MOUNTS": "/a:/b"},
            f"apptainer exec --nv --bind /a:/b,{ROOT},{Path.cwd()} --pwd {Path.cwd()} my image.sif {sys.executable} -m",
        ),
    ],
)
def test_ranks_are_started_by_a_launcher_on_each_node_perhaps_in_a_container(job, variables, words):
    process = job(SRUN=DONE, PYTHONPATH="/of/the/host", SLURM_EXPORT_ENV="NONE", **variables)
    text, _ = process.communicate(timeout=120)
    started = " ".join((job.run / "srun.txt").read_text().splitlines())
    assert process.returncode == 0 and words.format(run=job.run) in started, text
    assert started.startswith("--nodes 2 --ntasks 2 --ntasks-per-node 1 --cpu-bind=none ")
    inherited = (job.run / "environment.txt").read_text().splitlines()
    path = str(ROOT) if "CONTAINER_RUNTIME" in variables else f"{ROOT}:/of/the/host"
    assert {"SLURM_EXPORT_ENV=ALL", f"PYTHONPATH={path}"} <= set(inherited)
    assert ("PYTHONNOUSERSITE=1" in inherited) == ("CONTAINER_RUNTIME" in variables)
    if "LAUNCHER" in variables:
        assert (job.run / "hosts-44").read_text() == "node7 slots=4\n"


def test_pyxis_starts_steps_in_the_image(job):
    """Its srun has the container's options, both for reading the settings and for training; the image may greet."""
    beside = f'[[ $* = *gptoss_dist.cluster* ]] && echo Welcome && exec {sys.executable} "${{@:$#-3}}"; {DONE}'
    container = {"CONTAINER_IMAGE": "team#image:1", "CONTAINER_MOUNTS": "/a:/b", "CONTAINER_ENV": "NCCL_DEBUG"}
    process = job(SRUN=beside, CONTAINER_RUNTIME="pyxis", **container)
    text, _ = process.communicate(timeout=120)
    started = " ".join((job.run / "srun.txt").read_text().splitlines())
    mounts = f"{ROOT}:{ROOT},{Path.cwd()}:{Path.cwd()},/a:/b"
    assert process.returncode == 0, text
    assert f"--wait=60 --container-image team#image:1 --container-mounts {mounts} --container-workdir" in started
    assert "--container-env=PYTHONPATH,PYTHONNOUSERSITE,NCCL_DEBUG bash -c" in started


@pytest.mark.parametrize(
    "words, variables, message",
    [
        (["--train.stepz", "3"], {}, "job: "),
        ([], {"SLURM_NTASKS_PER_NODE": "8"}, "--ntasks-per-node=8: it must be 1, as one launcher on each node"),
        ([], {"LAUNCHER": "mpi"}, "LAUNCHER=mpi is not known; give torchrun or deepspeed"),
        ([], {"CONTAINER_RUNTIME": "docker"}, "CONTAINER_RUNTIME=docker is not known; give none, apptainer or pyxis"),
    ],
)
def test_a_mistake_ends_the_job_before_ranks_start(job, words, variables, message):
    process = job(*words, SRUN=DONE, **variables)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and message in text and not (job.run / "srun.txt").exists(), text


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(tmp_path):
    assert len(SCRIPTS) > 5
    done = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_job_beside_a_run_that_lives_leaves_its_files_alone(job):
    job.run.mkdir(exist_ok=True)
    (job.run / "STOPPED").touch()
    with owned(job.run):
        process = job(SRUN=DONE)
        text, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and f"{job.run} is in use by process {os.getpid()} on" in text, text
    assert (job.run / "STOPPED").exists() and not (job.run / "srun.txt").exists()
