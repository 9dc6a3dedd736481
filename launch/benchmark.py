#!/usr/bin/env python
"""Measure training speed against transformers, side by side.

    python launch/benchmark.py train --precision bf16 --seq-len 512 --batch-size 4

Every implementation lives in a process of its own; the processes take turns, a few training steps each, so that they
meet the same machine. Figures are medians over rounds, and ratios are taken round by round. It runs on the CPU, where
transformers has one attention with sinks that can be trained, `eager` (its flex attention has no backward pass there,
sdpa has no sinks), and two expert implementations worth timing. Ours sets up its process as training does, which
includes that freed memory is kept (`parallel/context.py`); transformers runs as it comes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

OURS, PEER, GEMM, COMPILED = "gptoss_dist", "transformers", "gemm", " compiled"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="whole training steps: forward, loss, backward, clipping, AdamW")
    train.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    train.add_argument("--seq-len", type=int, default=512, help="tokens per sample (512)")
    train.add_argument("--batch-size", type=int, default=4, help="samples per step (4)")
    train.add_argument("--threads", type=int, default=2, help="CPU threads of each process (2)")
    train.add_argument("--rounds", type=int, default=7, help="turns of each process (7)")
    train.add_argument("--steps", type=int, default=2, help="training steps per turn (2)")
    train.add_argument("--compile", action="store_true", help="measure both sides under torch.compile as well")
    train.add_argument("--experts", choices=["megablocks", "plain"], default="megablocks")
    train.add_argument("--worker", help=argparse.SUPPRESS)
    for name, value in {
        "hidden-size": 256,
        "layers": 4,
        "heads": 8,
        "kv-heads": 4,
        "head-dim": 32,
        "num-experts": 8,
        "top-k": 2,
        "intermediate-size": 512,
        "vocab-size": 8192,
    }.items():
        train.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.worker:
        work(arguments)
        return 0
    names = [OURS, f"{PEER} eager", f"{PEER} grouped_mm"]
    names = [*names, *(name + COMPILED for name in names if arguments.compile), GEMM]
    workers = {name: start_worker(argv, name, arguments.threads) for name in names}
    try:
        rounds = []
        for _ in range(arguments.rounds + 1):
            rounds.append({name: turn(worker, arguments.steps) for name, worker in workers.items()})
        report(arguments, rounds[1:])  # the first round warms up
    finally:
        for worker in workers.values():
            worker.kill()
    return 0


def start_worker(argv: list[str], name: str, threads: int) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, *argv, "--worker", name]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def turn(worker: subprocess.Popen, steps: int) -> dict:
    worker.stdin.write(f"{steps}\n")
    worker.stdin.flush()
    while line := worker.stdout.readline():
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit("benchmark.py: a worker ended early; its error is above")


def report(arguments: argparse.Namespace, rounds: list[dict]) -> None:
    tokens = arguments.batch_size * arguments.seq_len
    gemm = statistics.median(turn[GEMM]["flops_per_s"] for turn in rounds)
    flops = rounds[0][OURS]["flops_per_token"]
    print(
        f"{arguments.precision}, {arguments.batch_size} x {arguments.seq_len} tokens per step, {arguments.threads} "
        f"threads, {len(rounds)} rounds; GEMM ceiling {gemm / flops:,.0f} tok/s = {gemm / 1e9:,.0f} GFLOP/s measured "
        f"here / {flops / 1e6:.1f} MFLOP per token (6 x active weights + exact attention, no recomputation)"
    )
    medians = {}
    for name in (n for n in rounds[0] if n != GEMM):
        medians[name] = statistics.median(turn[name]["s_per_step"] for turn in rounds)
        rate = tokens / medians[name]
        print(f"  {name:<32}{rate:10,.0f} tok/s  {rate * flops / gemm:6.1%} of the GEMM ceiling")
    for ours in (name for name in medians if name.startswith(OURS)):
        for kind in dict.fromkeys(["", ours.removeprefix(OURS)]):  # eager transformers, then like against like
            peers = [n for n in medians if n.startswith(PEER) and n.endswith(COMPILED) == bool(kind)]
            best = min(peers, key=medians.get)
            ratios = sorted(turn[best]["s_per_step"] / turn[ours]["s_per_step"] for turn in rounds)
            print(
                f"  {ours} is {statistics.median(ratios):.2f}x {best} (round by round {ratios[0]:.2f} to "
                f"{ratios[-1]:.2f})"
            )


def work(arguments: argparse.Namespace) -> None:
    """A worker: build, then run as many steps as each line of standard input says."""
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.worker == GEMM:
        step, extra = gemm_step(arguments)
    else:
        step, extra = (ours if arguments.worker.startswith(OURS) else peer)(arguments)
    for _ in range(2):
        step()
    for line in sys.stdin:
        count = int(line)
        begin = time.perf_counter()
        for _ in range(count):
            step()
        seconds = (time.perf_counter() - begin) / count
        print(json.dumps({"s_per_step": seconds, **extra(seconds)}), flush=True)


def batch(arguments: argparse.Namespace):
    import torch

    tokens = torch.randint(0, arguments.vocab_size, (arguments.batch_size, arguments.seq_len + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def architecture(arguments: argparse.Namespace) -> dict:
    return {
        "vocab_size": arguments.vocab_size,
        "hidden_size": arguments.hidden_size,
        "intermediate_size": arguments.intermediate_size,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
        "head_dim": arguments.head_dim,
        "num_local_experts": arguments.num_experts,
        "num_experts_per_tok": arguments.top_k,
    }


def ours(arguments: argparse.Namespace):
    """The training engine as `launch/train.py` drives it, router losses and metrics sums included."""
    from gptoss_dist.config import Config, ModelConfig
    from gptoss_dist.engine import FsdpEngine
    from gptoss_dist.parallel.context import start
    from gptoss_dist.train.flops import flops_per_token

    config = Config(model=ModelConfig(**architecture(arguments)))
    config.data.seq_len, config.train.micro_batch_size = arguments.seq_len, arguments.batch_size
    config.train.precision, config.parallel.experts = arguments.precision, arguments.experts
    config.train.compile = arguments.worker.endswith(COMPILED)
    engine = FsdpEngine(config, start())
    input_ids, labels = batch(arguments)

    def step() -> None:
        engine.forward_backward([{"input_ids": input_ids, "labels": labels}])
        result = engine.update(1e-4)
        assert not bool(result.skipped)

    flops = flops_per_token(config.model, arguments.seq_len).training
    return step, lambda seconds: {"flops_per_token": flops}


def peer(arguments: argparse.Namespace):
    """transformers, in the compute type throughout (no float32 master weights, which it would only slow down)."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(**architecture(arguments), attn_implementation="eager")
    config._experts_implementation = arguments.worker.split()[1]
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    model = GptOssForCausalLM(config).to(dtype).train()
    assert model.config._experts_implementation == arguments.worker.split()[1]
    if arguments.worker.endswith(COMPILED):
        model.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    input_ids, labels = batch(arguments)

    def step() -> None:
        logits = model(input_ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, lambda seconds: {}


def gemm_step(arguments: argparse.Namespace):
    import torch

    size, dtype = 1024, torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    repeats = 40 if arguments.precision == "bf16" else 10

    def step() -> None:
        for _ in range(repeats):
            a @ b

    return step, lambda seconds: {"flops_per_s": 2 * size**3 * repeats / seconds}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
