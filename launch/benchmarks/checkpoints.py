#!/usr/bin/env python
"""Measure what saving costs a run: never, in the background, and waiting for it, in turns of the same run.

    python launch/benchmark_checkpoints.py --processes 2

Each turn trains `--every` steps after a save of its kind, and counts the time until the save is on disk. The order of
the kinds rotates, ratios are taken within a round. The pause is the time that the step itself is held up by the call,
which copies the state to host memory. Runs on the CPU with gloo; the model is that of configs/quickstart.yaml.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

KINDS = ("never", "asynchronous", "synchronous")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark_checkpoints.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="(2)")
    parser.add_argument("--every", type=int, default=10, help="steps between saves (10)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each kind (7)")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="samples of 256 tokens per process (4)")
    parser.add_argument("--folder", help="where to write the checkpoints (a temporary folder)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.worker:
        return work(arguments)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(arguments.processes)]
    threads = max(1, (os.cpu_count() or 1) // arguments.processes)
    with tempfile.TemporaryDirectory() as folder:
        target = ["--folder", folder] if arguments.folder is None else []
        done = subprocess.run(
            [*line, __file__, *argv, *target, "--worker"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    if done.returncode:
        return done.returncode
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{arguments.processes} processes, {found['parameters']:,} parameters, {found['bytes'] / 2**20:.0f} MiB per "
        f"checkpoint, one every {arguments.every} steps; medians of {arguments.rounds} turns"
    )
    for kind in KINDS[1:]:
        cost = [100 * (a / b - 1) for a, b in zip(found["seconds"][kind], found["seconds"]["never"])]
        pause = [100 * p / s for p, s in zip(found["pause"][kind], found["seconds"][kind])]
        print(
            f"  {kind:<13} costs {statistics.median(cost):5.1f} % ({min(cost):.1f} to {max(cost):.1f}); the step "
            f"itself is held up for {statistics.median(pause):.2f} % of the time ({min(pause):.2f} to {max(pause):.2f})"
        )
    return 0


def work(arguments: argparse.Namespace) -> int:
    """One process of the launch."""
    import torch

    from gptoss_dist.checkpoint import Retention, Saver
    from gptoss_dist.config import load_config
    from gptoss_dist.distributed.processes import shut_down, start
    from gptoss_dist.engine import build_engine

    ranks = start()
    config = load_config(
        Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml",
        overrides={"train.micro_batch_size": arguments.micro_batch_size},
    )
    engine = build_engine(config, ranks)
    shape = (arguments.micro_batch_size, config.data.seq_len + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(ranks.rank))
    batches = [{"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}]
    savers = {
        kind: Saver(Path(arguments.folder) / kind, keep=Retention(newest=2), asynchronous=kind == "asynchronous")
        for kind in KINDS[1:]
    }
    seconds, pause = {kind: [] for kind in KINDS}, {kind: [] for kind in KINDS}
    step = 0
    for turn in range(-1, arguments.rounds):  # the first is not counted
        for place in range(len(KINDS)):
            kind = KINDS[(turn + place) % len(KINDS)]
            torch.distributed.barrier()
            begin = time.perf_counter()
            if kind != "never":
                savers[kind].save(step, engine.state(), {})
            for _ in range(arguments.every):
                engine.forward_backward(batches)
                engine.update(1e-3).wait()
                step += 1
            if kind != "never":
                savers[kind].close()
            torch.distributed.barrier()
            if turn >= 0:
                seconds[kind].append(time.perf_counter() - begin)
                pause[kind].append(savers[kind].pause_s if kind != "never" else 0.0)
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
