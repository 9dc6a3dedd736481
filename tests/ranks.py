"""Running the project's commands as a user does, in one or several processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A model for the `corpus` fixture that trains a step in milliseconds.
MODEL = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "max_position_embeddings": 64,
}


def command(script: str, *arguments: str, processes: int = 1, launcher: str = "torchrun") -> list[str]:
    """A command line for `script`, under torchrun if there are several processes, or under deepspeed."""
    if launcher == "deepspeed":
        deepspeed = Path(sys.executable).with_name("deepspeed")
        line = [str(deepspeed), "--num_gpus", str(processes), "--master_port", str(_free_port())]
        return [*line, str(ROOT / script), *arguments]
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launcher, str(ROOT / script), *arguments]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def run(
    script: str,
    *arguments: str,
    processes: int = 1,
    launcher: str = "torchrun",
    cwd: Path | None = None,
    expect: int | None = 0,
    **extra: str,
) -> subprocess.CompletedProcess:
    """Run to the end; fail with its output unless it exits with `expect`."""
    done = subprocess.run(
        command(script, *arguments, processes=processes, launcher=launcher),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=environment(**extra),
    )
    if expect is not None and done.returncode != expect:
        raise AssertionError(f"exit code {done.returncode}, expected {expect}\n{done.stdout}\n{done.stderr}")
    return done


def losses(folder: Path, name: str = "loss/train") -> dict[int, float]:
    """{step: value} of a metric of a run, the last written row of each step."""
    from gptoss_dist.train.tracking import read_metrics

    return {row["step"]: row["metrics"][name] for row in read_metrics(folder) if name in row["metrics"]}
