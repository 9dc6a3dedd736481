#!/usr/bin/env python
"""Measure what saving costs a run: never, in the background, and waiting for it, in turns of the same run.

    python launch/benchmarks/checkpoints.py --processes 2

Each turn trains `--every` steps after a save of its kind, and counts the time until the save is on disk. The order of
the kinds rotates, and all kinds share the processes of one launch; see protocol.py for the rest. The pause is the time
that the step itself is held up by the call, which copies the state to host memory. Runs on the CPU with gloo; the model
is that of configs/quickstart.yaml.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.benchmarks.arguments import Parser, whole
from launch.benchmarks.protocol import (
    QUICKSTART,
    Spread,
    add_quick,
    environment,
    progress,
    rounds,
    run_worker,
    torchrun,
)

KINDS = ("never", "asynchronous", "synchronous")


def build_parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = Parser(prog="checkpoints.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=whole, default=2, help="(2)")
    parser.add_argument("--every", type=whole, default=10, help="steps between saves (10)")
    parser.add_argument("--rounds", type=whole, default=7, help="turns of each kind (7)")
    parser.add_argument("--micro-batch-size", type=whole, default=4, help="samples of 256 tokens per process (4)")
    parser.add_argument("--folder", help="where to write the checkpoints (a temporary folder)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    add_quick(parser, argv, every=4, rounds=2, micro_batch_size=1)
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser(argv).parse_args(argv)
    if arguments.worker:
        return work(arguments)
    threads = max(1, (os.cpu_count() or 1) // arguments.processes)
    with tempfile.TemporaryDirectory() as folder:
        target = ["--folder", folder] if arguments.folder is None else []
        command = [*torchrun(arguments.processes), __file__, *argv, *target, "--worker"]
        found = run_worker("the run", command, environment(threads))
    print(
        f"{arguments.processes} processes, {found['parameters']:,} parameters, {found['bytes'] / 2**20:.0f} MiB per "
        f"checkpoint, one every {arguments.every} steps; medians of {arguments.rounds} turns"
    )
    for kind in KINDS[1:]:
        cost = Spread.of(100 * (a / b - 1) for a, b in zip(found["seconds"][kind], found["seconds"]["never"]))
        pause = Spread.of(100 * p / s for p, s in zip(found["pause"][kind], found["seconds"][kind]))
        print(
            f"  {kind:<13} costs {cost.median:5.1f} % ({cost.range('.1f')}); the step itself is held up for "
            f"{pause.median:.2f} % of the time ({pause.range('.2f')})"
        )
    return 0


def counted(count: int, says: bool) -> Iterator[int]:
    """Count turns from -1, which is not counted; one process of the launch says how far it is."""
    return (turn - 1 for turn in (rounds(count + 1) if says else range(count + 1)))


def work(arguments: argparse.Namespace) -> int:
    """Measure all kinds, in one process of the launch."""
    import torch

    from gptoss_dist.checkpoint import Retention, Saver
    from gptoss_dist.config import load_config
    from gptoss_dist.distributed.processes import init_distributed, shut_down
    from gptoss_dist.engine import build_engine
    from gptoss_dist.train.objectives import next_token_prediction
    from gptoss_dist.train.start import engine_settings

    ranks = init_distributed()
    config = load_config(
        QUICKSTART,
        overrides={"train.micro_batch_size": arguments.micro_batch_size},
    )
    engine = build_engine(engine_settings(config), ranks, next_token_prediction)
    shape = (arguments.micro_batch_size, config.data.seq_len + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(ranks.rank))
    batches = [{"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}]
    savers = {
        kind: Saver(Path(arguments.folder) / kind, keep=Retention(newest=2), asynchronous=kind == "asynchronous")
        for kind in KINDS[1:]
    }
    seconds, pause = {kind: [] for kind in KINDS}, {kind: [] for kind in KINDS}
    step = 0
    for turn in counted(arguments.rounds, ranks.is_main):
        for place in range(len(KINDS)):
            kind = KINDS[(turn + place) % len(KINDS)]
            torch.distributed.barrier()
            begin = time.perf_counter()
            if kind != "never":
                savers[kind].save(step, engine.state(), {})
            for _ in range(arguments.every):
                sums = engine.forward_backward(batches)
                engine.update(sums, 1e-3).wait()
                step += 1
            if kind != "never":
                savers[kind].close()
            torch.distributed.barrier()
            if turn >= 0:
                seconds[kind].append(time.perf_counter() - begin)
                pause[kind].append(savers[kind].pause_s if kind != "never" else 0.0)
                if ranks.is_main:
                    progress(f"{kind}: {seconds[kind][-1]:.3g} s, of which {pause[kind][-1]:.3g} s held up")
    if ranks.is_main:
        newest = max((Path(arguments.folder) / "asynchronous").glob("step_*"))
        found = {"seconds": seconds, "pause": pause, "bytes": sum(p.stat().st_size for p in newest.iterdir())}
        found["parameters"] = sum(p.numel() for p in engine.model.parameters())
        for kind in savers:
            shutil.rmtree(Path(arguments.folder) / kind)
        print(json.dumps(found), flush=True)
    return shut_down()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
