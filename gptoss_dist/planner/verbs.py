"""The further verbs of `launch/plan.py`: measure a machine, list a step's operators, compare with published runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.command_line import Program, option, ranged, run
from gptoss_dist.engine import Objective
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.planner.hardware import find_gpu

HARDWARE_FOLDER = "configs/hardware"


@dataclass
class CalibrateOptions:
    """Measure this machine in a minute or two, for plans of runs on it."""

    name: str = option()
    """What to call it."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What to measure."""
    output: str | None = None
    """The file; null is configs/hardware/NAME.yaml. It is replaced if it exists."""


@dataclass
class OperatorsOptions:
    """List the operators of a training step on a GPU, and where the host waits for it; no GPU is needed."""

    model: str = option()
    """A file such as configs/model/gptoss_20b.yaml."""
    gpu: str = "h100-80gb"
    """Which one; its compute capability decides on the back ends."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """As train.precision."""
    seq_len: int = ranged(4096, at_least=1)
    """Tokens of a sample."""
    micro_batch_size: int = ranged(8, at_least=1)
    """Samples."""
    documents: bool = False
    """Attention stays within documents."""
    activation_checkpointing: int = ranged(0, at_least=0)
    """As train.activation_checkpointing."""
    device: Literal["meta", "cuda"] = "meta"
    """`cuda` traces the forward pass on fake CUDA tensors, which needs the CUDA build of torch, and no GPU."""


@dataclass
class PublishedOptions:
    """Predict what others published, and print both."""

    runs: list[str] = option(default_factory=list, metavar="NAME")
    """The beginning of their names; without one all are predicted, which takes minutes."""


def calibrate(argv: list[str], objective: Objective) -> int:
    """Measure this machine; return the exit code."""

    def measure(options: CalibrateOptions) -> None:
        from gptoss_dist.planner.timing.calibrate import calibrate as measured
        from gptoss_dist.planner.timing.calibration import write_calibration

        if not re.fullmatch(r"[\w-][\w.-]*", options.name):
            raise ValueError(f"--name {options.name!r} is no name of a file; use letters, digits, - and _")
        path = Path(options.output or Path(HARDWARE_FOLDER) / f"{options.name}.yaml")
        found = measured(
            objective, options.device, options.name, report=lambda part: print(f"measuring {part}", flush=True)
        )
        write_calibration(found, path)
        print(f"wrote {path}; use it with launch/plan.py --hardware {path}")

    return run(_program("calibrate"), CalibrateOptions, measure, argv)


def operators(argv: list[str], objective: Objective) -> int:
    """List the operators of a step; return the exit code, 1 if the host waits where nobody knows of it."""

    def listed(options: OperatorsOptions) -> int:
        from gptoss_dist.planner.tracing.cuda_trace import describe, trace_cuda

        gpu = find_gpu(options.gpu)
        if gpu.capability is None:
            raise ValueError(f"--gpu {gpu.name} is not NVIDIA's: it has no compute capability to choose back ends by")
        trace = trace_cuda(
            ModelConfig.from_yaml(options.model),
            precision=options.precision,
            capability=gpu.capability,
            seq_len=options.seq_len,
            micro_batch_size=options.micro_batch_size,
            documents=options.documents,
            checkpointing=options.activation_checkpointing,
            device=options.device,
        )
        print(describe(trace))
        return 1 if trace.undocumented else 0

    return run(_program("operators"), OperatorsOptions, listed, argv)


def published(argv: list[str], objective: Objective) -> int:
    """Compare predictions with published figures; return the exit code."""

    def compare(options: PublishedOptions) -> None:
        from gptoss_dist.planner.timing.accuracy import predict_published, table
        from gptoss_dist.planner.timing.published import PUBLISHED

        starts = tuple(options.runs)
        chosen = [one for one in PUBLISHED if not starts or one.name.startswith(starts)]
        if not chosen:
            names = "; ".join(one.name for one in PUBLISHED)
            raise ValueError(f"--runs {' '.join(starts)} is unknown; use one of {names}")
        print(table([predict_published(one, objective) for one in chosen]))

    return run(_program("published"), PublishedOptions, compare, argv)


def _program(verb: str) -> Program:
    return Program(f"plan.py {verb}", prefix=f"plan.py {verb}", failed=2)
