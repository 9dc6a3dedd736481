#!/usr/bin/env python
"""Measure the speed of training and of generation against transformers, side by side.

    python launch/benchmark.py train --precision bf16 --seq-len 512 --batch-size 4
    python launch/benchmark.py moe [--quick]
    python launch/benchmark.py decode [--model configs/model/gptoss_73m.yaml]

`train` times whole training steps, `moe` the forward and backward pass of one mixture-of-experts layer, and `decode`
generation (decode.py). Every implementation lives in a process of its own, which takes turns of a few steps; see
protocol.py. It runs on the CPU, where transformers has one attention with sinks that can be trained, `eager` (its flex
attention has no backward pass there, sdpa has no sinks), and two expert implementations worth timing. The GEMM ceiling
of bf16 is the faster of bare products in bf16 and in float32, in which ours multiplies on CPUs without bf16
instructions (`gptoss_dist/ops/gemm.py`). Ours sets up its process as training does, which includes that freed memory is
kept (`distributed/processes.py`); the others run as they come.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.benchmarks import decode
from launch.benchmarks.arguments import Parser, whole
from launch.benchmarks.protocol import Spread, add_quick, progress, rounds, start_worker, turn

# The first word of a worker's name says what it builds, further words are variants of it.
OURS, PEER, LOOP, GEMM = "gptoss_dist", "transformers", "loop", "gemm"
COMPILED, ROUTING = " compiled", " routing"
GEMM_FP32 = "gemm float32"
QUICK = {
    "train": {"batch_size": 1, "seq_len": 256, "rounds": 2, "steps": 1},
    "moe": {
        "precision": "bf16",
        "tokens": 512,
        "hidden_size": 256,
        "intermediate_size": 256,
        "rounds": 2,
        "steps": 1,
    },
}
"""Sizes for `--quick`: without instructions for bf16, a step of the others takes a hundred times as long as here."""


def build_parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = Parser(prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="whole training steps: forward, loss, backward, clipping, AdamW")
    train.add_argument("--seq-len", type=whole, default=512, help="tokens per sample (512)")
    train.add_argument("--batch-size", type=whole, default=4, help="samples per step (4)")
    train.add_argument("--compile", action="store_true", help="measure both sides under torch.compile as well")
    train.add_argument("--experts", choices=["megablocks", "plain"], default="megablocks")
    moe = commands.add_parser("moe", help="one layer, router and experts: forward and backward")
    moe.add_argument("--tokens", type=whole, default=4096, help="tokens per step (4096)")
    moe.add_argument("--batches", type=whole, default=1, help="different inputs, so different routings, in turn (1)")
    train_sizes = {"layers": 4, "heads": 8, "kv-heads": 4, "head-dim": 32, "vocab-size": 8192}
    for command, precision, sizes in (
        (train, "fp32", {"hidden-size": 256, "intermediate-size": 512, "num-experts": 8, "top-k": 2, **train_sizes}),
        (moe, "both", {"hidden-size": 512, "intermediate-size": 512, "num-experts": 32, "top-k": 4}),
    ):
        command.add_argument("--precision", choices=["fp32", "bf16", "both"], default=precision, help=f"({precision})")
        command.add_argument("--threads", type=whole, default=2, help="CPU threads of each process (2)")
        command.add_argument("--rounds", type=whole, default=7, help="turns of each process (7)")
        command.add_argument("--steps", type=whole, default=2, help="steps per turn (2)")
        command.add_argument("--worker", help=argparse.SUPPRESS)
        for name, value in sizes.items():
            command.add_argument(f"--{name}", type=whole, default=value, help=f"({value})")
    for command, name in ((train, "train"), (moe, "moe")):
        add_quick(command, argv, **QUICK[name])
    decode.add_options(commands, argv)
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser(argv).parse_args(argv)
    if arguments.command == "decode":
        return decode.main(arguments, argv, __file__, architecture(arguments))
    if arguments.worker:
        work(arguments)
        return 0
    names = [OURS, f"{PEER} eager", f"{PEER} grouped_mm"]
    if arguments.command == "moe":
        names += [LOOP, OURS + ROUTING]
    elif arguments.compile:
        names += [name + COMPILED for name in names]
    precisions = ["fp32", "bf16"] if arguments.precision == "both" else [arguments.precision]
    workers = {}
    try:
        for precision in precisions:
            for name in [*names, GEMM, *([GEMM_FP32] if precision == "bf16" else [])]:
                line = [__file__, *argv, "--precision", precision, "--worker", name]
                workers[precision, name] = start_worker(line, arguments.threads)
        progress(f"{len(workers)} processes; each imports what it needs at its first turn")
        done = take_turns(arguments, workers)
        for precision in precisions:  # the first round warms up
            report(arguments, precision, [{n: t for (p, n), t in r.items() if p == precision} for r in done[1:]])
    finally:
        for worker in workers.values():
            worker.kill()
    return 0


def take_turns(arguments: argparse.Namespace, workers: dict[tuple[str, str], subprocess.Popen]) -> list[dict]:
    """Return what each round found, the one that warms up first; those that are whole if the user has had enough."""
    done: list[dict] = []
    try:
        for _ in rounds(arguments.rounds + 1):
            found = {}
            for (precision, name), worker in workers.items():
                found[precision, name] = turn(worker, arguments.steps)
                warms_up = " (warms up)" if not done else ""
                progress(f"{precision} {name}: {found[precision, name]['s_per_step']:.3g} s per step{warms_up}")
            done.append(found)
    except KeyboardInterrupt:
        if len(done) < 2:
            raise SystemExit("benchmark.py: interrupted before the first round was done") from None
        progress(f"interrupted: of {len(done) - 1} whole rounds")
    return done


def report(arguments: argparse.Namespace, precision: str, rounds: list[dict]) -> None:
    tokens, about = (about_train if arguments.command == "train" else about_moe)(arguments, rounds)
    gemm = fastest_gemm(rounds)
    print(f"{precision}, {about}; {arguments.threads} threads, {len(rounds)} rounds")
    if GEMM_FP32 in rounds[0]:
        used, other = ("float32", "bf16") if gemm == GEMM_FP32 else ("bf16", "float32")
        ratio = ratios(rounds, ({GEMM, GEMM_FP32} - {gemm}).pop(), gemm).median
        print(f"  the ceiling's products are computed in {used}, {ratio:.2f}x as fast as in {other} on this CPU")
    medians = {}
    for name in (n for n in rounds[0] if not n.startswith(GEMM) and ROUTING not in n):
        medians[name] = statistics.median(seconds(rounds, name))
        share = ratios(rounds, gemm, name).median
        print(f"  {name:<32}{tokens / medians[name]:10,.0f} tok/s  {share:6.1%} of the GEMM ceiling")
    for ours in (name for name in medians if name.startswith(OURS)):
        for kind in dict.fromkeys(["", ours.removeprefix(OURS)]):  # eager others, then like against like
            others = [n for n in medians if not n.startswith(OURS) and n.endswith(COMPILED) == bool(kind)]
            best = min(others, key=medians.get)
            ratio = ratios(rounds, best, ours)
            print(f"  {ours} is {ratio.median:.2f}x {best} (round by round {ratio.range('.2f')})")
    if OURS + ROUTING in rounds[0]:
        share = ratios(rounds, OURS + ROUTING, gemm)
        print(
            f"  routing and permutation of {OURS}: {share.median:.1%} of the GEMM time (round by round "
            f"{share.range('.1%')})"
        )


def fastest_gemm(rounds: list[dict]) -> str:
    """Return the worker whose products are the ceiling."""
    names = (name for name in rounds[0] if name.startswith(GEMM))
    return min(names, key=lambda name: statistics.median(seconds(rounds, name)))


def gemm_dtype(arguments: argparse.Namespace):
    import torch

    return torch.bfloat16 if arguments.precision == "bf16" and arguments.worker != GEMM_FP32 else torch.float32


def seconds(rounds: list[dict], name: str) -> list[float]:
    """Return the seconds per step of a worker in every round."""
    return [turn[name]["s_per_step"] for turn in rounds]


def ratios(rounds: list[dict], a: str, b: str) -> Spread:
    """Compare the time of worker a with that of worker b, round by round."""
    return Spread.of_ratios(seconds(rounds, a), seconds(rounds, b))


def about_train(arguments: argparse.Namespace, rounds: list[dict]) -> tuple[int, str]:
    flops = rounds[0][GEMM]["flops_per_token"]
    tokens = arguments.batch_size * arguments.seq_len
    ceiling = tokens / statistics.median(seconds(rounds, fastest_gemm(rounds)))
    return tokens, (
        f"{arguments.batch_size} x {arguments.seq_len} tokens per step; GEMM ceiling {ceiling:,.0f} tok/s = "
        f"{ceiling * flops / 1e9:,.0f} GFLOP/s measured here / {flops / 1e6:.1f} MFLOP per token (6 x active weights + "
        "exact attention, no recomputation)"
    )


def about_moe(arguments: argparse.Namespace, rounds: list[dict]) -> tuple[int, str]:
    low, high = rounds[0][GEMM]["tokens_per_expert"]
    return arguments.tokens, (
        f"{arguments.tokens:,} tokens of size {arguments.hidden_size}, {arguments.num_experts} experts (top "
        f"{arguments.top_k}) of size {arguments.intermediate_size}, {low} to {high} tokens each (random router, random "
        "input); GEMM ceiling: the six bare GEMMs of every expert"
    )


def work(arguments: argparse.Namespace) -> None:
    """Work as a worker: each line of standard input is a turn of so many steps; the first one also builds the step."""
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    builders = {
        "train": {OURS: ours, PEER: peer, GEMM: gemm_step},
        "moe": {OURS: moe_step, PEER: moe_step, LOOP: moe_step, GEMM: moe_gemm_step},
    }
    facts = None
    for count in map(int, sys.stdin):
        if facts is None:
            step, facts = builders[arguments.command][arguments.worker.split()[0]](arguments)
        begin = time.perf_counter()
        for _ in range(count):
            step()
        seconds = (time.perf_counter() - begin) / count
        print(json.dumps({"s_per_step": seconds / facts.get("share_of_step", 1), **facts}), flush=True)


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
    """Build the training engine as `launch/train.py` drives it, router losses and metrics sums included."""
    from gptoss_dist.config import ModelConfig
    from gptoss_dist.distributed.processes import init_distributed
    from gptoss_dist.engine import EngineSettings, build_engine
    from gptoss_dist.train.objectives import next_token_prediction

    settings = EngineSettings(model=ModelConfig(**architecture(arguments)))
    settings.train.micro_batch_size = arguments.batch_size
    settings.train.precision, settings.parallel.experts = arguments.precision, arguments.experts
    settings.train.compile = arguments.worker.endswith(COMPILED)
    engine = build_engine(settings, init_distributed(), next_token_prediction)
    input_ids, labels = batch(arguments)

    def step() -> None:
        sums = engine.forward_backward([{"input_ids": input_ids, "labels": labels}])
        result = engine.update(sums, 1e-4)
        assert not bool(result.skipped)

    return step, {}


def peer(arguments: argparse.Namespace):
    """Build transformers' model, in the compute type throughout: float32 master weights would only slow it down."""
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

    return step, {}


def gemm_step(arguments: argparse.Namespace):
    import torch

    from gptoss_dist.model.config import ModelConfig
    from gptoss_dist.planner.flops import flops_per_token

    size, repeats = 1024, 20
    a, b = (torch.randn(size, size, dtype=gemm_dtype(arguments)) for _ in range(2))

    def step() -> None:
        for _ in range(repeats):
            a @ b

    flops = flops_per_token(ModelConfig(**architecture(arguments)), arguments.seq_len).training
    share = 2 * size**3 * repeats / (flops * arguments.batch_size * arguments.seq_len)
    return step, {"flops_per_token": flops, "share_of_step": share}


def moe_reference(arguments: argparse.Namespace):
    """Return transformers' eager layer and the inputs; the seed of the workers gives all of them the same."""
    import torch
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    config = GptOssConfig(
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_local_experts=arguments.num_experts,
        num_experts_per_tok=arguments.top_k,
    )
    config._experts_implementation = "eager"
    layer = GptOssMLP(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=config.initializer_range)
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    inputs = [torch.randn(1, arguments.tokens, arguments.hidden_size).to(dtype) for _ in range(arguments.batches)]
    return layer.to(dtype), inputs


def moe_step(arguments: argparse.Namespace):
    """Build one layer's forward and backward in the compute type, with gradients of all parameters and of the input."""
    import torch

    kind, *variant = arguments.worker.split()
    if kind == OURS:
        from gptoss_dist.distributed.processes import init_distributed

        init_distributed()  # before anything large is allocated
    reference, inputs = moe_reference(arguments)
    d_y = torch.randn_like(inputs[0])

    def forward_backward(layer, x):
        x = x.detach().requires_grad_()
        y = layer(x)[0]
        y.backward(d_y)
        for parameter in layer.parameters():
            parameter.grad = None
        return y.detach(), x.grad

    expected = forward_backward(reference, inputs[0])
    layer = reference if kind == PEER else moe_layer(reference, arguments)
    if kind == PEER:
        layer.experts.config._experts_implementation = variant[0]
    if variant == [ROUTING.strip()]:
        layer.experts.mlp = lambda x_ND, tokens_per_expert_E: x_ND
    else:
        for a, b in zip(forward_backward(layer, inputs[0]), expected):
            error = float((a.double() - b.double()).norm() / b.double().norm())
            limit = 1e-2 if arguments.precision == "bf16" else 1e-5
            assert error <= limit, f"{arguments.worker} is off transformers eager by {error:.1e}, {arguments.precision}"
    turns = itertools.cycle(inputs)
    return lambda: forward_backward(layer, next(turns)), {}


def moe_layer(reference, arguments: argparse.Namespace):
    """Return our layer with the weights of `reference`, with the experts of training or the plain loop."""
    from gptoss_dist.model.config import ModelConfig
    from gptoss_dist.model.moe import MoE
    from gptoss_dist.parallel.experts import DroplessExperts

    fields = ("hidden_size", "intermediate_size", "num_local_experts", "num_experts_per_tok")
    config = reference.experts.config
    layer = MoE(ModelConfig(**{field: getattr(config, field) for field in fields})).to(reference.router.weight.dtype)
    layer.load_state_dict(reference.state_dict())
    if arguments.worker == LOOP:
        layer.experts.backend = "loop"
    else:
        layer.experts = DroplessExperts(layer.experts, arguments.top_k)
    return layer


def moe_gemm_step(arguments: argparse.Namespace):
    """Build the bare matrix products of the experts, forward and backward, for the rows that the router gives them."""
    import torch

    layer, (x_1TD, *_) = moe_reference(arguments)
    indices_TK = layer.router(x_1TD[0])[-1]
    counts = torch.bincount(indices_TK.flatten(), minlength=arguments.num_experts).tolist()
    dtype = gemm_dtype(arguments)
    w1_EDF, w2_EID = (w.detach().to(dtype) for w in (layer.experts.gate_up_proj, layer.experts.down_proj))
    widths = (arguments.hidden_size, 2 * arguments.intermediate_size, arguments.intermediate_size)
    (x_ND, y_ND), (h_NF, dh_NF), (a_NI, da_NI) = (torch.randn(2, sum(counts), n, dtype=dtype) for n in widths)
    rows = (tensor.split(counts) for tensor in (x_ND, y_ND, h_NF, dh_NF, a_NI, da_NI, torch.empty_like(x_ND)))
    weights = (w1_EDF, w2_EID, torch.empty_like(w1_EDF), torch.empty_like(w2_EID))
    experts = list(zip(*rows, *weights))

    def step() -> None:
        for x, y, h, _, a, _, _, w1, w2, _, _ in experts:
            torch.mm(x, w1, out=h)
            torch.mm(a, w2, out=y)
        for x, dy, _, dh, a, da, dx, w1, w2, dw1, dw2 in experts:
            torch.mm(dy, w2.t(), out=da)
            torch.mm(a.t(), dy, out=dw2)
            torch.mm(x.t(), dh, out=dw1)
            torch.mm(dh, w1.t(), out=dx)

    return step, {"tokens_per_expert": [min(counts), max(counts)]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
