"""Mistakes that one process of several meets alone: that one says so. And what a run over machines says first."""

import pytest
import torch
from ranks import run

from gptoss_dist.parallel.context import LocalError, start

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


def test_the_rank_that_gets_too_many_rows_says_so(settings, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    options = ("--config", str(settings), "--parallel.expert_parallel", "2", "--validation.every", "0")
    done = run(str(script), *options, processes=2, expect=1)
    assert done.stderr.count("expert_parallel=2 spans machines of 1 processes") == 1, done.stderr
    assert done.stderr.count("train.py: ") == 1, done.stderr
    assert "train.py: rank 1: 67108865 rows" in done.stderr and "lower train.micro_batch_size" in done.stderr


def test_a_process_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(LocalError, match="LOCAL_RANK=1 but this machine has 1 GPUs"):
        start()
