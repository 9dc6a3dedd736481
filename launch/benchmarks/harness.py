#!/usr/bin/env python
"""Compare tasks of lm-eval on a run with the same on its export in the harness's own `hf` model, in turns.

    python launch/benchmarks/harness.py --checkpoint runs/NAME --export FOLDER --include tasks/ --tasks choose write

A turn is a process of its own that loads the model and the tasks, answers a few documents to warm up, and is then timed
from the documents to the metrics, each task by itself: by the clock, and by the processor, which is the surer figure on
a machine that others use. `hf` takes the fastest of the batch sizes, found for each task
before the rounds. Answers and log-likelihoods are compared in every round.
"""

import argparse
import json
import math
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.benchmarks.arguments import Parser, whole
from launch.benchmarks.protocol import Spread, add_quick, environment, progress, rounds, run_worker

WARM_UP = 2
"""Documents."""


def build_parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = Parser(
        prog="benchmarks/harness.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a run, or a checkpoint")
    parser.add_argument("--export", required=True, help="the same model, exported with --dtype float32")
    parser.add_argument("--include", required=True, help="folder of task files")
    parser.add_argument("--tasks", nargs="+", required=True, help="their names")
    parser.add_argument("--limit", type=whole, default=None, help="documents of each task (all)")
    parser.add_argument("--batch-sizes", type=whole, nargs="+", default=[1, 8, 32], help="for hf (1 8 32)")
    parser.add_argument("--threads", type=whole, default=2, help="CPU threads (2)")
    parser.add_argument("--rounds", type=whole, default=3, help="turns of each (3)")
    parser.add_argument("--worker", choices=("ours", "hf"), help=argparse.SUPPRESS)
    add_quick(parser, argv, rounds=1, limit=8)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = build_parser(argv).parse_args(argv)
    if arguments.worker:
        print(json.dumps({task: measure(arguments, task) for task in arguments.tasks}))
        return 0
    sizes = {task: fastest_batch_size(arguments, task) for task in arguments.tasks}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {task: {"ours": [], "hf": []} for task in arguments.tasks}
    differences = dict.fromkeys(arguments.tasks, 0.0)
    for number in rounds(arguments.rounds):
        for task in arguments.tasks:
            turns = {}
            for name in ("ours", "hf") if number % 2 == 0 else ("hf", "ours"):
                turns[name] = turn(arguments, name, task, sizes[task])
                found[task][name].append(turns[name])
                progress(
                    f"{task}, {name}: {turns[name]['seconds']:.2f} s, processor {turns[name]['processor_s']:.2f} s"
                )
            differences[task] = max(differences[task], compare(task, turns["ours"], turns["hf"]))
    report(found, sizes)
    for task, difference in differences.items():
        print(f"{task}: same answers; largest difference of a log-likelihood {difference:.1e}")
    return 0


def report(found: dict[str, dict[str, list[dict[str, Any]]]], sizes: dict[str, int]) -> None:
    """Print seconds and ratios of each task, and of all of them together."""
    for key, clock in (("seconds", "clock"), ("processor_s", "processor")):
        sums: dict[str, list[float]] = {}
        for task, turns in found.items():
            times = {name: [one[key] for one in turns[name]] for name in ("ours", "hf")}
            print(f"{task}, {clock}: {_side_by_side(times)} (hf in batches of {sizes[task]})")
            sums = {name: [a + b for a, b in zip(sums.get(name, [0.0] * len(of)), of)] for name, of in times.items()}
        if len(found) > 1:
            print(f"all, {clock}: {_side_by_side(sums)}")


def _side_by_side(times: dict[str, list[float]]) -> str:
    ratio = Spread.of_ratios(times["hf"], times["ours"])
    return f"ours {Spread.of(times['ours']):.2f} s, hf {Spread.of(times['hf']):.2f} s: {ratio:.2f} times as fast"


def fastest_batch_size(arguments: argparse.Namespace, task: str) -> int:
    """Return the batch size with which `hf` is the fastest."""
    seconds = {size: turn(arguments, "hf", task, size)["seconds"] for size in arguments.batch_sizes}
    progress(f"{task}, hf: " + ", ".join(f"{taken:.2f} s in batches of {size}" for size, taken in seconds.items()))
    return min(seconds, key=seconds.__getitem__)


def turn(arguments: argparse.Namespace, name: str, task: str, batch_size: int) -> dict[str, Any]:
    """Run one task in a process of its own."""
    line = [sys.executable, __file__, "--worker", name, "--tasks", task, "--batch-sizes", str(batch_size)]
    for option in ("checkpoint", "export", "include", "limit"):
        if (value := getattr(arguments, option)) is not None:
            line += [f"--{option}", str(value)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return run_worker(f"{name} on {task}", line, environment(arguments.threads, **offline))[task]


def measure(arguments: argparse.Namespace, task: str) -> dict[str, Any]:
    """Answer a task; for a worker."""
    from gptoss_dist.evaluation.harness.tasks import find_tasks, load_tasks, run_tasks

    model = our_model(arguments) if arguments.worker == "ours" else hf_model(arguments)
    manager = find_tasks([task], arguments.include)
    run_tasks(model, load_tasks(manager, [task], None), limit=WARM_UP)
    loaded = load_tasks(manager, [task], None)
    begin, processor = time.perf_counter(), time.process_time()
    findings = run_tasks(model, loaded, limit=arguments.limit, keep_samples=True, with_errors=False)
    spent = {"seconds": time.perf_counter() - begin, "processor_s": time.process_time() - processor}
    return {**spent, "answers": [sample["resps"] for sample in findings.samples], "rows": findings.rows}


def our_model(arguments: argparse.Namespace) -> Any:
    """Return this project's model for the harness."""
    import torch

    from gptoss_dist.distributed.processes import Ranks
    from gptoss_dist.evaluation.harness.language_model import HarnessModel
    from gptoss_dist.evaluation.harness.team import Team
    from gptoss_dist.evaluation.options import HarnessOptions
    from gptoss_dist.evaluation.subjects import load

    options = HarnessOptions(checkpoint=arguments.checkpoint, tasks=arguments.tasks)
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    evaluated = load(options, ranks)
    team = Team(ranks, evaluated.model, evaluated.tokenizer, options.batch_tokens)
    return HarnessModel(team, evaluated.tokenizer, max_length=evaluated.model.config.max_position_embeddings)


def hf_model(arguments: argparse.Namespace) -> Any:
    """Return the harness's own model for an export."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=arguments.export, dtype="float32", device="cpu", batch_size=arguments.batch_sizes[0])


def compare(task: str, ours: dict[str, Any], hf: dict[str, Any]) -> float:
    """Return the largest difference of a log-likelihood.

    Raises:
        SystemExit: Texts, greedy answers or metrics differ.
    """
    largest = 0.0
    for mine, theirs in zip(_leaves(ours["answers"]), _leaves(hf["answers"]), strict=True):
        if isinstance(mine, float):
            largest = max(largest, abs(mine - theirs))
        elif mine != theirs:
            raise SystemExit(f"{task}: ours is {mine!r} where hf is {theirs!r}")
    for mine, theirs in zip(ours["rows"], hf["rows"], strict=True):
        if not math.isclose(mine["value"], theirs["value"], rel_tol=1e-4, abs_tol=1e-4):
            raise SystemExit(f"{task}: {mine['metric']} is {mine['value']}, and {theirs['value']} with hf")
    return largest


def _leaves(answers: Any) -> list[Any]:
    return list(chain.from_iterable(map(_leaves, answers))) if isinstance(answers, list) else [answers]


if __name__ == "__main__":
    sys.exit(main())
