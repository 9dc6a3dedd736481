#!/usr/bin/env python
"""Measure the engines side by side: memory, bytes moved and step time of each process, for the same model and batch.

    python launch/benchmark_engines.py --processes 2 4

Every engine gets a launch of its own, in turn; see protocol.py. Held is what stays between steps: the memory of every
tensor, counted once. The peak is what the process grew by, from before the model is built to after the last step; freed
memory that is not used again counts. Bytes are those that one process sends per optimizer step, by the usual count of
ring algorithms: (n-1)/n of what is gathered or scattered, twice that for an all-reduce, and what really leaves for an
all-to-all. Runs on the CPU with gloo; the bytes do not depend on the device, time and memory do.
"""

import argparse
import gc
import json
import resource
import statistics
import sys
import time
from contextlib import suppress
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

ENGINES = {
    "fsdp": {"engine.kind": "fsdp"},
    "fsdp, weights kept": {"engine.kind": "fsdp", "parallel.reshard_after_forward": "false"},
    "zero-1": {"engine.kind": "deepspeed", "engine.zero_stage": 1},
    "zero-2": {"engine.kind": "deepspeed", "engine.zero_stage": 2},
    "zero-3": {"engine.kind": "deepspeed", "engine.zero_stage": 3},
}


def build_parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = Parser(
        prog="benchmark_engines.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=whole, nargs="+", default=[2, 4], help="process counts to measure (2 4)")
    parser.add_argument("--expert-parallel", type=whole, default=1, help="processes over which experts are spread (1)")
    parser.add_argument("--accumulation", type=whole, default=1, help="micro-batches per step (1)")
    parser.add_argument("--samples", type=whole, default=4, help="samples per micro-batch of all processes (4)")
    parser.add_argument("--seq-len", type=whole, default=128, help="tokens per sample (128)")
    parser.add_argument("--hidden-size", type=whole, default=512, help="(512); experts are twice as wide")
    parser.add_argument("--experts", type=whole, default=16, help="experts per layer (16)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="(fp32)")
    parser.add_argument("--steps", type=whole, default=4, help="steps per turn, the first not timed (4)")
    parser.add_argument("--rounds", type=whole, default=3, help="turns of each engine (3)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    add_quick(parser, argv, samples=2, seq_len=64, hidden_size=128, experts=8, steps=2, rounds=1)
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser(argv).parse_args(argv)
    if arguments.worker:
        return work(arguments)
    for processes in arguments.processes:
        results = {name: [] for name in ENGINES}
        for _ in rounds(arguments.rounds):
            for name, found in results.items():
                found.append(launch(name, processes, argv))
                held, seconds = found[-1]["held"] / 2**20, found[-1]["seconds"]
                progress(f"{processes} processes, {name}: {seconds:.3g} s per step, {held:.0f} MiB held")
        print(
            f"{processes} processes, experts over {arguments.expert_parallel}, {arguments.precision}, "
            f"{arguments.samples} x {arguments.seq_len} tokens, accumulation {arguments.accumulation}; "
            f"{results['fsdp'][0]['parameters']:,} parameters; medians of {arguments.rounds} turns"
        )
        for name, found in results.items():
            held, memory, sent = (
                statistics.median(f[key] for f in found) / 2**20 for key in ("held", "memory", "sent")
            )
            ratio = Spread.of_ratios((f["seconds"] for f in found), (f["seconds"] for f in results["fsdp"]))
            losses = max(abs(f["loss"] / g["loss"] - 1) for f, g in zip(found, results["fsdp"]))
            print(
                f"  {name:<20}{held:8.0f} MiB held {memory:8.0f} MiB at the peak {sent:8.1f} MiB sent per step "
                f"{ratio.median:6.2f}x fsdp's step time ({ratio.range('.2f')}); "
                f"last loss differs by {losses:.0e}"
            )
    return 0


def launch(name: str, processes: int, argv: list[str]) -> dict:
    """Return what one turn of an engine found, in processes of its own."""
    return run_worker(name, [*torchrun(processes), __file__, *argv, "--worker", name], environment(threads=1))


def work(arguments: argparse.Namespace) -> int:
    """Measure one engine, in one process of a launch."""
    import torch

    from gptoss_dist.distributed.processes import init_distributed, shut_down
    from gptoss_dist.engine import build_engine
    from gptoss_dist.train.objectives import next_token_prediction
    from gptoss_dist.train.start import engine_settings

    ranks = init_distributed()
    config = worker_config(arguments, ranks)
    if config.engine.kind == "deepspeed":
        from gptoss_dist.engine.deepspeed import load_deepspeed

        load_deepspeed(ranks)  # its code is not what is measured
    before = peak_memory()
    engine = build_engine(engine_settings(config), ranks, next_token_prediction)
    found = time_steps(engine, worker_batches(arguments, config, ranks), arguments.steps)
    memory = ranks.sum(torch.tensor(float(peak_memory() - before))) / ranks.world_size
    if ranks.is_main:
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
        found |= {"held": held_memory(), "memory": float(memory), "parameters": parameters}
        print(json.dumps(found), flush=True)
    return shut_down()


def worker_config(arguments: argparse.Namespace, ranks):
    """Return the quickstart run with the engine of this worker and the sizes that were asked for."""
    from gptoss_dist.config import load_config

    return load_config(
        QUICKSTART,
        overrides=ENGINES[arguments.worker]
        | {
            "model.hidden_size": arguments.hidden_size,
            "model.intermediate_size": 2 * arguments.hidden_size,
            "model.num_local_experts": arguments.experts,
            "parallel.expert_parallel": arguments.expert_parallel,
            "train.precision": arguments.precision,
            "train.micro_batch_size": arguments.samples // ranks.world_size,
            "train.gradient_accumulation": arguments.accumulation,
            "data.seq_len": arguments.seq_len,
        },
    )


def worker_batches(arguments: argparse.Namespace, config, ranks) -> list[dict]:
    """Return the micro-batches of one step: this process's share of the same random samples, whatever the engine."""
    import torch

    share = config.train.micro_batch_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.model.vocab_size, (arguments.samples, arguments.seq_len + 1), generator=generator)
    mine = tokens[ranks.rank * share : (ranks.rank + 1) * share]
    return [{"input_ids": mine[:, :-1], "labels": mine[:, 1:]}] * arguments.accumulation


def time_steps(engine, batches: list[dict], steps: int) -> dict:
    """Train some steps. Return the median of their seconds, the bytes that one of them sends, and the last loss."""
    import torch

    from gptoss_dist.parallel.traffic import SentBytes

    seconds, sent = [], 0
    for step in range(steps):
        counter = SentBytes()
        torch.distributed.barrier()
        begin = time.perf_counter()
        # Counting takes time: it is done in the step that is not timed.
        with counter.counting(step == 0):
            sums = engine.forward_backward(batches)
            result = engine.update(sums, 1e-3)
        loss = float(result.wait().loss)
        torch.distributed.barrier()
        if step == 0:
            sent = counter.total
        else:
            seconds.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(seconds), "sent": sent, "loss": loss}


def held_memory() -> int:
    """Return the bytes of all tensors that are alive."""
    import torch

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            with suppress(RuntimeError, NotImplementedError):  # DTensors and others without memory of their own
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_memory() -> int:
    """Return the bytes of this process at its peak so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
