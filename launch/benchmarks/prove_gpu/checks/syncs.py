"""Item `syncs`: how often the host waits for the device within a training step, and where.

A real training run, loop and all, under `torch.cuda.set_sync_debug_mode("warn")`: torch then warns of every operation
that makes the host wait, but for explicit waits, such as that for the result of the step before. Counted are steps
after the warm-up and before the last one, which is followed by a checkpoint.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gptoss_dist.config import load_config
from gptoss_dist.distributed.processes import init_distributed, shut_down
from gptoss_dist.tracking.metrics import StepTimer
from gptoss_dist.train.loop import train
from launch.benchmarks.prove_gpu.checks.runs import QUIET, TINY, prepared_data
from launch.benchmarks.prove_gpu.findings import ROOT, Findings, run_item

WARNING = "called a synchronizing CUDA operation"
"""What torch says, in c10/cuda/CUDAFunctions.cpp."""
WARM_UP, STEPS = 5, 20
FRAMES = 5


class SyncCounter:
    """Counts torch's warnings by the step that they fall in and the stack that they come from.

    Args:
        first: The first step that counts.
        last: The last one.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.step = first, last, 0
        self.stacks: Counter[str] = Counter()

    @property
    def per_step(self) -> float:
        """How often the host waited in a step, on average."""
        return self.stacks.total() / (self.last - self.first + 1)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count during what is enclosed, which must be a run of the training loop: its timer marks the steps."""
        start, showwarning = StepTimer.start, warnings.showwarning

        def counted_start(timer: StepTimer) -> None:
            self.step += 1
            start(timer)

        def count(message, category, filename, lineno, file=None, line=None) -> None:
            if WARNING not in str(message):
                showwarning(message, category, filename, lineno, file, line)
            elif self.first <= self.step <= self.last:
                self.stacks[_stack()] += 1

        with warnings.catch_warnings():
            warnings.filterwarnings("always", message=f".*{WARNING}")
            StepTimer.start, warnings.showwarning = counted_start, count
            try:
                yield
            finally:
                StepTimer.start = start


def _stack() -> str:
    """Return the innermost frames of the caller, the project's own ones at least, one a line."""
    frames = [f for f in traceback.extract_stack()[:-2] if "/warnings.py" not in f.filename]
    ours = [f for f in frames if f.filename.startswith(str(ROOT)) and "site-packages" not in f.filename]
    chosen = [frame for frame in frames if frame in ours[-FRAMES:] or frame in frames[-2:]]
    return "\n".join(
        f"{frame.filename.removeprefix(f'{ROOT}/')}:{frame.lineno} {frame.name}: {frame.line}" for frame in chosen
    )


def syncs(findings: Findings, work: Path) -> None:
    """Count for the default run, and for one whose attention stays within documents."""
    data, ranks = prepared_data(findings, work), init_distributed()
    for name, most, settings in (
        ("default", 0.0, {}),
        # The borders of documents are read back once per micro-batch (docs/status.md).
        ("document_mask", 1.0, {"data.document_mask": True}),
    ):
        overrides = QUIET | {"train.steps": STEPS, "tracking.mlflow": False, "tracking.plots": False}
        overrides |= {
            "data.path": data,
            "run.name": name,
            "run.dir": work / "runs/syncs" / name,
            "train.precision": "bf16",
        }
        overrides |= (TINY if findings.rehearse else {}) | settings
        counter = SyncCounter(WARM_UP + 1, STEPS - 1)
        on_cuda = ranks.device.type == "cuda"
        if on_cuda:
            torch.cuda.set_sync_debug_mode("warn")
        with counter.counting():
            train(load_config(ROOT / "configs/quickstart.yaml", overrides=overrides), ranks)
        if on_cuda:
            torch.cuda.set_sync_debug_mode("default")
        findings.check(f"{name}: the run's steps were seen", counter.step == STEPS, f"{counter.step} of {STEPS}")
        if on_cuda:
            findings.floor(f"{name}: host synchronisations per step", counter.per_step, most=most)
        else:
            findings.figure(f"{name}: host synchronisations per step", None, note="without CUDA no one is counted")
        stacks = (
            f"{count} times in {STEPS - 1 - WARM_UP} steps\n{stack}" for stack, count in counter.stacks.most_common()
        )
        if text := "\n\n".join(stacks):
            findings.text(f"{name}: where the host waits", text)
    shut_down()


if __name__ == "__main__":
    run_item({"syncs": syncs}, __doc__)
