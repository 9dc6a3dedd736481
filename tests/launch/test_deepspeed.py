"""The other engine and the other launcher: the same run."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.disk import locked
from gptoss_dist.checkpoint import checkpoints
from tests.support.ranks import command, environment, losses, run

pytestmark = pytest.mark.distributed

NAMES = ("loss/train", "loss/aux", "optim/grad_norm")


def assert_continues(folder, whole, first: int, last: int, rel: float = 2e-6) -> None:
    """The steps of `folder` have the losses of the uninterrupted run."""
    assert sorted(losses(folder)) == list(range(first, last + 1))
    for name in NAMES:
        found, expected = losses(folder, name), losses(whole, name)
        assert all(found[n] == pytest.approx(expected[n], rel=rel) for n in found), name


def test_deepspeed_launch_is_stopped_and_goes_on_bit_identical(settings, tmp_path):
    """Started by deepspeed and stopped by a signal, a run goes on as if nobody had launched or stopped it so.

    No compiler is in reach: DeepSpeed would like to compile at start-up. The signal goes to the command alone, which
    dies of it and tells nobody: what it started notices.
    """
    options = ["--config", str(settings), "--train.steps", "40", "--checkpoint.every", "0", "--validation.every", "20"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    bare = {"PATH": str(Path(sys.executable).parent)}
    assert shutil.which("g++", path=bare["PATH"]) is None
    run("launch/train.py", *options, "--run.dir", str(whole), "--engine.kind", "deepspeed", processes=2, **bare)

    line = command("launch/train.py", *options, "--run.dir", str(parts), processes=2, launcher="deepspeed")
    process = subprocess.Popen(
        line, env=environment(**bare), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    metrics, deadline = parts / "metrics.jsonl", time.time() + 120
    try:
        while time.time() < deadline and not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
            time.sleep(0.05)
        process.terminate()
        process.wait(timeout=60)
        while time.time() < deadline and not checkpoints(parts / "checkpoints"):
            time.sleep(0.2)  # the launcher has not waited for what it started
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    (saved,) = checkpoints(parts / "checkpoints")
    with locked(parts / ".lock", wait_s=60):
        pass  # and what it started has ended
    stopped = json.loads((saved / "checkpoint.json").read_text())["step"]
    assert stopped == max(losses(parts)) and stopped < 40
    assert "kind: deepspeed" in (parts / "config.yaml").read_text()
    assert "2 processes, deepspeed ZeRO-2" in (parts / "log.txt").read_text()

    run(
        "launch/train.py",
        *options,
        *shlex.split(f"--run.dir {parts} --resume auto --engine.kind deepspeed"),
        processes=2,
        **bare,
    )
    for name in (*NAMES, "loss/val"):
        assert losses(parts, name) == losses(whole, name)
    assert sorted(losses(parts)) == list(range(1, 41))


def test_a_checkpoint_moves_between_engines_and_layouts(settings, tmp_path):
    """Two steps on each: FSDP 4x2, ZeRO-3 2x2, FSDP 2x1, ZeRO-1 4x4, one process."""
    options = shlex.split(
        f"--config {settings} --validation.every 0 --checkpoint.keep 0 --optim.schedule constant "
        "--model.router_selection_bias true --loss.selection_bias_rate 0.01 --model.tie_word_embeddings true "
        "--sampling.every 1 --sampling.prompts '[a]' --sampling.max_new_tokens 4"
    )
    whole = tmp_path / "whole"
    run("launch/train.py", *options, "--run.dir", str(whole), "--train.steps", "10", "--train.micro_batch_size", "4")
    hops = [("fsdp", 4, 2), ("zero 3", 2, 2), ("fsdp", 2, 1), ("zero 1", 4, 4), ("fsdp", 1, 1)]
    before = None
    for index, (engine, processes, expert_parallel) in enumerate(hops):
        folder = tmp_path / str(index)
        _, *stage = engine.split()
        here = ["--engine.kind", "deepspeed", "--engine.zero_stage", *stage] if stage else ["--engine.kind", "fsdp"]
        resume = ["--resume", str(before)] if before else []
        run(
            "launch/train.py",
            *options,
            *here,
            *resume,
            *shlex.split(
                f"--run.dir {folder} --parallel.expert_parallel {expert_parallel} "
                f"--train.micro_batch_size {4 // processes} --train.steps {2 * index + 2}"
            ),
            processes=processes,
        )
        assert_continues(folder, whole, 2 * index + 1, 2 * index + 2)
        (before,) = checkpoints(folder / "checkpoints")


def test_started_by_srun_without_a_launcher(settings, tmp_path):
    """Two processes with the variables that Slurm gives each task of a step, and nothing else."""
    folder = tmp_path / "srun"
    line = command("launch/train.py", "--config", str(settings), "--run.dir", str(folder), "--train.steps", "2")
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODEID": "0",
    }
    tasks = [
        subprocess.Popen(
            line, env=environment(**job, SLURM_PROCID=str(n), SLURM_LOCALID=str(n)), stderr=subprocess.DEVNULL
        )
        for n in range(2)
    ]
    assert [task.wait(timeout=120) for task in tasks] == [0, 0]
    assert sorted(losses(folder)) == [1, 2] and "2 processes, fsdp" in (folder / "log.txt").read_text()


MISTAKES = [
    ("deepspeed", '{"optimizer": {"type": "Adam"}}', "optimizer={'type': 'Adam'} has no place here"),
    ("zero_stage", "4", "engine.zero_stage=4 is not possible; choose 1, 2 or 3"),
    ("deepspeed", '{"zero_optimization": {"stage": 3, "overlap_com": true}}', "overlap_com"),
]
VARIABLES = {"LOCAL_SIZE": "2", "CROSS_RANK": "0", "CROSS_SIZE": "1"}
"""What DeepSpeed's launcher sets beside torchrun's variables."""


@pytest.mark.parametrize("launcher", [None, pytest.param("deepspeed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("option, value, message", MISTAKES)
def test_a_mistake_is_said_once_and_ends_all(settings, launcher, option, value, message):
    """With the variables of DeepSpeed's launcher, and under that launcher; torchrun's part is in test_one_rank.py."""
    done = run(
        "launch/train.py",
        "--config",
        str(settings),
        f"--engine.{option}",
        value,
        processes=2,
        launcher=launcher,
        expect=2,
        **({} if launcher else VARIABLES),
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1 and message in said[0], done.stderr
    assert "Traceback" not in done.stderr
