"""Twenty runs at once: processes that each record a run with the project's tracker and deliver it to MLflow.

python tests/docker/log_points.py FOLDER RUNS STEPS, with MLFLOW_TRACKING_URI set. What takes seconds is imported once.
"""

import os
import sys
from pathlib import Path

import mlflow  # noqa: F401

from gptoss_dist.tracking import tracker

METRICS = ("loss/train", "loss/aux", "optim/lr", "throughput/tokens_per_s", "grad/norm")


def log(folder: Path, number: int, steps: int) -> None:
    run = tracker.Tracker(folder / f"run{number}", run_name=f"run{number}", experiment="at once", interval_s=0.5)
    for step in range(1, steps + 1):
        run.log(step, dict.fromkeys(METRICS, number + step / 1000))
    run.artifact(folder / "note.txt", "notes")
    run.close(timeout=300)


def main(folder: Path, runs: int, steps: int) -> int:
    (folder / "note.txt").write_text("hello")
    children = []
    for number in range(runs):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                log(folder, number, steps)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
