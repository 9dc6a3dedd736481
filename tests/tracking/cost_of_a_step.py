"""What recording a step costs the training thread, here and in another checkout, in turns.

    git worktree add ../before main
    python -m tests.tracking.cost_of_a_step ../before

Each side is a process of its own that reports steps of a model with 24 layers and 32 experts, as `train/run.py` does.
The clock is the processor time of the training thread, so that other work on the machine counts little. Of each round
the median over hundreds of steps counts; printed are the median and the least of the rounds, in microseconds.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROUNDS, STEPS, AT_ONCE = 5, 1000, 100


def measure(folder: Path) -> float:
    """Return microseconds per step of `Report.step` and all that it calls."""
    import torch

    from gptoss_dist.config import Config, ModelConfig, RunConfig, TrackingConfig
    from gptoss_dist.parallel.mesh import DeviceLayout
    from gptoss_dist.train.report import LaunchedStep, Report
    from gptoss_dist.train.start import Start

    model = ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    tracking = TrackingConfig(mlflow=False, plots=False, expert_tokens_every=0)
    config = Config(model=model, run=RunConfig(dir=str(folder)), tracking=tracking)
    config.train.steps = 10**6
    config.save(folder / "config.yaml")
    ranks = SimpleNamespace(world_size=1, rank=0, device=torch.device("cpu"), hosts=("here",))
    mixture = SimpleNamespace(manifest_sha256="0", changes=[], sources=[None], usage=lambda position: [], weights={})
    engine = SimpleNamespace(name="fsdp", layout=DeviceLayout(1, 1, 1))
    report = Report(config, ranks, engine, SimpleNamespace(mixture=mixture, history=[]), Start())
    zero = torch.zeros(())
    result = SimpleNamespace(
        loss=torch.tensor(3.0),
        aux=zero,
        z=zero,
        grad_norm=torch.ones(()),
        skipped=zero,
        entropy_L=torch.ones(24),
        counts_LE=torch.full((24, 32), 100.0),
        traffic_R3=None,
    )
    timing = {"perf/step_ms": 1e9, "perf/data_ms": 1.0, "perf/compute_ms": 90.0, "perf/optimizer_ms": 9.0}
    times = []
    for first in range(1, STEPS, AT_ONCE):
        began = time.thread_time()
        for step in range(first, first + AT_ONCE):
            report.step(LaunchedStep(step, result, 1e-3, timing, 8 * step), 0)
        times.append((time.thread_time() - began) / AT_ONCE)
    report.close("FINISHED")
    return 1e6 * statistics.median(times[1:])


def side(checkout: Path) -> float:
    """Measure in a process that imports the packages of a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, Path(__file__).resolve(), "--measure", folder],
            env=os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    return float(done.stdout.split()[-1])


def main(before: Path) -> None:
    """Print the figures of both checkouts, and their ratio."""
    now = Path(__file__).parents[2]
    figures: dict[str, list[float]] = {"before": [], "now": []}
    for turn in range(ROUNDS):
        for name, checkout in sorted({"before": before, "now": now}.items(), reverse=bool(turn % 2)):
            figures[name].append(side(checkout))
            print(f"{name} {figures[name][-1]:.1f} us", flush=True)
    for what, of in (("median", statistics.median), ("least", min)):
        old, new = of(figures["before"]), of(figures["now"])
        print(f"{what}: before {old:.1f} us a step, now {new:.1f} us, ratio {new / old:.3f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(measure(Path(sys.argv[2])))
    elif len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        sys.exit("usage: python -m tests.tracking.cost_of_a_step CHECKOUT")
