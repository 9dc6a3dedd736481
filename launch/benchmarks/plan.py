#!/usr/bin/env python
"""Compare the planner's step times with real ones of this machine; `launch/plan.py published` has those of others.

    python launch/benchmarks/plan.py steps [--hardware configs/hardware/NAME.yaml]

`steps` measures this machine (about a minute) unless a file says what it does, predicts a step of some models that were
not measured for that, trains each of them in a process of its own, and prints both. With one thread, seconds are those
of the processor, so that others who use the machine cost little; with more they are the wall's.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.benchmarks.arguments import Parser, whole
from launch.benchmarks.protocol import add_quick, progress, rounds


@dataclass(frozen=True)
class Case:
    """A model and a batch whose step is predicted and measured."""

    hidden: int
    layers: int
    experts: int
    seq_len: int
    micro_batch: int
    recompute: int = 0
    top_k: int = 2
    precision: Literal["fp32", "bf16"] = "fp32"

    def __str__(self) -> str:
        checkpointing = {0: "", 1: ", all blocks recomputed", 2: ", every second block recomputed"}[self.recompute]
        return (
            f"{self.hidden} wide, {self.layers} layers, {self.top_k} of {self.experts} experts, "
            f"{self.micro_batch} x {self.seq_len} tokens, {self.precision}{checkpointing}"
        )


CASES = (
    Case(hidden=256, layers=4, experts=8, seq_len=512, micro_batch=4),
    Case(hidden=512, layers=2, experts=8, seq_len=256, micro_batch=4),
    Case(hidden=256, layers=2, experts=16, seq_len=1024, micro_batch=2, recompute=1),
    Case(hidden=384, layers=4, experts=8, seq_len=2048, micro_batch=1, recompute=2),
    Case(hidden=768, layers=2, experts=4, seq_len=512, micro_batch=2),
    Case(hidden=256, layers=6, experts=32, seq_len=512, micro_batch=2, recompute=1, top_k=4),
    Case(hidden=512, layers=2, experts=8, seq_len=512, micro_batch=2, precision="bf16"),
)


def build_parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = Parser(prog="plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    steps = commands.add_parser("steps", help="steps on this machine, predicted and measured")
    steps.add_argument(
        "--hardware", type=Path, help="a file that `calibrate` wrote; without it this machine is measured"
    )
    steps.add_argument("--threads", type=whole, default=1, help="CPU threads of a process (1)")
    steps.add_argument("--steps", type=whole, default=7, help="steps that are timed, after two that warm up (7)")
    steps.add_argument("--cases", type=whole, default=len(CASES), help=f"how many cases, of {len(CASES)} (all)")
    add_quick(steps, argv, steps=5, cases=2)
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser(argv).parse_args(argv)
    try:
        return compare_steps(arguments)
    except ValueError as error:
        print(f"plan.py: {error}", file=sys.stderr)
        return 2


def compare_steps(arguments: argparse.Namespace) -> int:
    """Print a table of predicted and measured steps."""
    import torch

    from gptoss_dist.planner.timing.steps import measure_steps, predict_step
    from gptoss_dist.train.objectives import next_token_prediction

    calibration = calibrated(arguments)
    torch.set_num_threads(arguments.threads)
    chosen = CASES[: arguments.cases]
    print(f"{calibration.name}: {calibration.device}, {calibration.threads} threads; {arguments.steps} steps each")
    print("| case | predicted, ms | measured, ms | wall, ms | measured / predicted |\n|---|---|---|---|---|")
    for index in rounds(len(chosen)):
        case = chosen[index]
        settings = settings_of(case)
        predicted = predict_step(settings, case.seq_len, next_token_prediction, calibration)
        device = torch.device("cpu" if calibration.device == "cpu" else "cuda")
        measured = measure_steps(
            settings, case.seq_len, next_token_prediction, device, calibration.threads, arguments.steps
        )
        seconds = measured.seconds(calibration.threads)
        wall = sorted(measured.wall)[len(measured.wall) // 2]
        figures = f"{1e3 * predicted.seconds:.0f} | {1e3 * seconds:.0f} | {1e3 * wall:.0f}"
        print(f"| {case} | {figures} | {seconds / predicted.seconds:.2f} |", flush=True)
        parts = sorted(predicted.by_kind.items(), key=lambda item: -item[1])[:6]
        product = 2 * 512**3 / measured.product_s / 1e9
        progress(
            f"a product of 512 at {product:.0f} GFLOP/s; predicted "
            + ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in parts)
        )
    return 0


def calibrated(arguments: argparse.Namespace):
    import torch

    from gptoss_dist.planner.timing.calibrate import calibrate
    from gptoss_dist.planner.timing.calibration import read_calibration
    from gptoss_dist.train.objectives import next_token_prediction

    if arguments.hardware is None:
        torch.set_num_threads(arguments.threads)
        return calibrate(next_token_prediction, report=lambda part: progress(f"measuring {part}"))
    calibration = read_calibration(arguments.hardware)
    if calibration.threads != arguments.threads:
        raise ValueError(
            f"{arguments.hardware}: threads={calibration.threads}, but --threads {arguments.threads}; give the same"
        )
    return calibration


def settings_of(case: Case):
    """Return the engine's settings for a case; heads are 64 wide."""
    from gptoss_dist.config import TrainConfig
    from gptoss_dist.engine import EngineSettings
    from gptoss_dist.model.config import ModelConfig

    heads = case.hidden // 64
    model = ModelConfig(
        vocab_size=4112,
        hidden_size=case.hidden,
        intermediate_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        num_local_experts=case.experts,
        num_experts_per_tok=case.top_k,
        rope_scaling=None,
    )
    train = TrainConfig(
        micro_batch_size=case.micro_batch, precision=case.precision, activation_checkpointing=case.recompute
    )
    return EngineSettings(model, train)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
