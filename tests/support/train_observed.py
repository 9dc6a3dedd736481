"""launch/train.py, watched from outside: what it reads is written down, and it kills itself where it is told to.

Variables of the environment:

- ROWS: a file prefix. Rank r adds a line to ROWS.r for each step that it reads: `{"place": samples consumed after it,
  "rows": [micro-batch, sample, token]}`.
- KILL_AT: `recorded`, right after the samples to skip were written for the first time; `restored`, when the run has
  gone back to a checkpoint; `trained`, when it has read its first step after that.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

from data_pipeline import BatchLoader
from gptoss_dist import checkpoint
from gptoss_dist.engine.base import Engine
from gptoss_dist.train import loop

ROOT = Path(__file__).resolve().parents[2]


def kill_at(moment: str) -> None:
    if os.environ.get("KILL_AT") == moment:
        os.kill(os.getpid(), signal.SIGKILL)


def write_skipped(folder, skipped):
    is_new = bool(skipped) and not checkpoint.read_skipped(folder)
    original["write_skipped"](folder, skipped)
    if is_new:
        kill_at("recorded")


def restore(engine, start, *arguments, **options):
    original["restore"](engine, start, *arguments, **options)
    if start.skipped:
        restored.append(start)
        kill_at("restored")


def forward_backward(engine, batches):
    if restored:
        kill_at("trained")
    return original["forward_backward"](engine, batches)


def read(loader):
    step = original["read"](loader)
    if prefix := os.environ.get("ROWS"):
        line = {"place": loader.samples_consumed, "rows": [batch["input_ids"].tolist() for batch in step]}
        with open(f"{prefix}.{os.environ.get('RANK', 0)}", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return step


restored: list = []
original = {
    "write_skipped": checkpoint.write_skipped,
    "restore": loop.restore,
    "forward_backward": Engine.forward_backward,
    "read": BatchLoader.__next__,
}
checkpoint.write_skipped, loop.restore = write_skipped, restore
Engine.forward_backward, BatchLoader.__next__ = forward_backward, read
sys.argv[0] = "train.py"
runpy.run_path(str(ROOT / "launch/train.py"), run_name="__main__")
