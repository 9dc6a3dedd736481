"""Mistakes that one process of several meets alone: that one says so. And what a run over machines says first."""

import pytest
import torch

from gptoss_dist.distributed import launchers
from gptoss_dist.distributed.collectives import LocalError
from gptoss_dist.distributed.processes import init_distributed
from tests.support.ranks import run

SCRIPT = """
import os
import sys

from gptoss_dist.parallel.megablocks_compat import load_megablocks
from launch.train import main

os.environ["LOCAL_WORLD_SIZE"] = "1"  # as if each process had a machine of its own
if os.environ["RANK"] == "1":
    kernels = load_megablocks().kernels
    of_cuda = kernels.gather.__wrapped__

    def too_many_rows(x, *args):
        return of_cuda(x.new_empty(2**31 // x.shape[1] + 1, x.shape[1], device="meta"), *args)

    kernels.gather = too_many_rows
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.distributed
def test_the_rank_that_gets_too_many_rows_says_so(settings, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    options = ("--config", str(settings), "--parallel.expert_parallel", "2", "--validation.every", "0")
    done = run(str(script), *options, processes=2, launcher="torchrun", expect=1)
    assert done.stderr.count("expert_parallel=2 spans machines of 1 processes") == 1, done.stderr
    assert done.stderr.count("train.py: ") == 1, done.stderr
    assert "train.py: rank 1: 67108865 rows" in done.stderr and "lower train.micro_batch_size" in done.stderr


SLOW_FIRST = """
import os
import sys
import time

from launch.train import main

time.sleep(1.5 * (os.environ["RANK"] == "0"))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.distributed
def test_the_first_rank_is_heard_though_it_is_the_last(tmp_path):
    """A launcher ends all processes when the first of them leaves."""
    script = tmp_path / "script.py"
    script.write_text(SLOW_FIRST)
    done = run(str(script), "--train.stepz", "3", processes=2, launcher="torchrun", expect=1)
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1 and "stepz" in said[0], done.stderr
    assert done.stderr.count("Traceback") == 1  # torchrun's own


SLOW_SECOND = """
import os
import sys
import time

import torch.distributed as dist

from gptoss_dist.train import loop
from launch.train import main


def build_engine(settings, ranks, objective):
    if ranks.rank == 1:
        end, store = time.monotonic() + 1.5, dist.distributed_c10d._get_default_store()
        while time.monotonic() < end:
            store.add("late", 1)  # as making a group does
    raise ValueError("no such engine")


loop.build_engine = build_engine
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.distributed
def test_the_first_rank_is_there_until_all_have_met_the_mistake(settings, tmp_path):
    """Without torchrun its process is where the others look for each other."""
    script = tmp_path / "script.py"
    script.write_text(SLOW_SECOND)
    done = run(str(script), "--config", str(settings), processes=2, expect=2)
    assert done.stderr.count("train.py: no such engine") == 1 and "Traceback" not in done.stderr, done.stderr


def test_a_rank_that_lives_on_says_it_too(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(launchers, "_program", "verb.py")
    launchers.report_error_once("too many rows", patience_s=0)
    assert capsys.readouterr().err == "verb.py: rank 5: too many rows\n"


def test_a_process_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(LocalError, match="LOCAL_RANK=1 but this machine has 1 GPUs"):
        init_distributed()
