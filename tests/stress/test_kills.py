"""Kills at random moments: whatever is killed and when, the run that goes on is the run that nobody killed.

`sh launch/test.sh` kills once in each of two cases, which between them have every value; KILLS=60 pytest tests/stress
kills sixty times, in four cases.
"""

import os
import random
import shlex
import signal
import time

import pytest
import torch

from gptoss_dist.checkpoint import checkpoints, load_state, read_info, verify
from gptoss_dist.checkpoint.formats.tensor_files import stored_tensors
from tests.support.ranks import losses, run, start

pytestmark = pytest.mark.distributed

KILLS = max(1, int(os.environ.get("KILLS", "4")) // 4)
"""Of each of the four cases."""
STEPS = 30 + 15 * KILLS


def state(folder) -> dict[str, torch.Tensor]:
    """Everything that the newest checkpoint holds, weights and optimizer."""
    checkpoint = checkpoints(folder / "checkpoints")[-1]
    assert read_info(checkpoint)["step"] == STEPS
    found = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in stored_tensors(checkpoint).items()}
    load_state(checkpoint, found)
    return found


@pytest.fixture(scope="module", autouse=True)
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "processes, asynchronous",
    [
        pytest.param(1, False, id="1-synchronous"),
        pytest.param(2, True, id="2-asynchronous"),
        pytest.param(1, True, id="1-asynchronous", marks=pytest.mark.slow),
        pytest.param(2, False, id="2-synchronous", marks=pytest.mark.slow),
    ],
)
def test_killed_again_and_again_it_ends_bit_identical(settings, tmp_path, processes, asynchronous):
    draw = random.Random(f"{processes} {asynchronous}")
    options = shlex.split(
        f"--config {settings} --checkpoint.every 3 --train.steps {STEPS} --validation.every 0 "
        "--train.deterministic true --model.tie_word_embeddings true --loss.router_jitter 0.05 "
        f"--parallel.expert_parallel {processes} --checkpoint.asynchronous {str(asynchronous).lower()}"
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run("launch/train.py", *options, "--run.dir", str(whole), processes=processes)
    again = [*options, "--run.dir", str(killed), "--resume", "auto"]
    kills, in_saves, furthest = 0, 0, 0
    while kills < KILLS:
        process = start("launch/train.py", *again, processes=processes)
        before, deadline = furthest, time.time() + 120
        while process.is_running() and not (furthest := newest_step(killed)) > before:
            assert time.time() < deadline
            time.sleep(0.01)
        if draw.random() < 0.5:  # while a checkpoint is being written
            while process.is_running() and not list((killed / "checkpoints").glob("*.tmp")):
                time.sleep(0.0005)
            time.sleep(draw.random() * 0.01)
        else:
            time.sleep(draw.random() * 0.1)
        in_saves += bool(list((killed / "checkpoints").glob("*.tmp")))
        ranks = range(processes) if draw.random() < 0.5 else [draw.randrange(processes)]
        process.send(signal.SIGKILL, ranks)
        kills += process.wait().returncode != 0
        for checkpoint in checkpoints(killed / "checkpoints"):
            assert verify(checkpoint) == [], "an unfinished checkpoint looks complete"
        assert newest_step(killed) < STEPS, f"the run ended after {kills} kills: more STEPS are needed"
    run("launch/train.py", *again, processes=processes)
    assert losses(killed) == losses(whole) and len(losses(whole)) == STEPS
    expected, found = state(whole), state(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert in_saves > 0 or KILLS < 5
    print(f"{kills} kills, {in_saves} of them while a checkpoint was being written")


def newest_step(folder) -> int:
    return max(losses(folder), default=0) if (folder / "metrics.jsonl").is_file() else 0
