"""The verb `decode` of benchmark.py: how fast a model generates, beside transformers' `generate` on the same weights.

A model is exported once, and every implementation loads the export in a process of its own; see protocol.py. A turn
generates for every case: prompts of equal length in batches, decoded greedily, and one long prompt of which only the
first token is wanted. Decoding is timed from the first new token to the last, the first token from the call.

transformers attends by `eager` where a model has sinks and runs on a CPU. Its experts are computed one by one
(`eager`), by torch's grouped products (`grouped_mm`), or in one batched product on copies of the chosen weights
(`batched_mm`), to which transformers itself changes for decoding where it is not on a CPU; here it does so on the CPU
too. `static` has a cache of fixed size and a decoding step under torch.compile. Compilation falls into the first round,
which no figure contains. Ours is what `generate.py` calls, which compiles nothing for so few tokens; `--compile`
measures the compiled step too.

The text of all must be the same in float32. In bf16 each rounds where it likes, and how many tokens agree is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

from launch.benchmarks.arguments import whole
from launch.benchmarks.protocol import Spread, add_quick, progress, rounds, start_worker, turn

OURS, COMPILED = "gptoss_dist", "gptoss_dist compiled"
PEERS = ("eager", "grouped_mm", "batched_mm", "grouped_mm static", "batched_mm static")
"""What to try of transformers: the experts, and `static` for the compiled step."""
QUICK: dict[str, float | str] = {"rounds": 1, "prompt": 64, "new_tokens": 8, "long_prompt": 256, "precision": "fp32"}


class Case(NamedTuple):
    """One thing to time."""

    batch: int
    prompt: int
    new: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.prompt:,} tokens, {self.new} new"


def add_options(commands, argv: list[str]) -> None:
    """Add the verb to the parser of benchmark.py."""
    parser = commands.add_parser(
        "decode", help="generation: decoding, and the first token", description=__doc__.partition("\n\n")[2]
    )
    parser.add_argument("--prompt", type=whole, default=1024, help="tokens of each prompt (1024)")
    parser.add_argument("--new-tokens", type=whole, default=128, help="tokens to generate (128)")
    parser.add_argument("--batch-sizes", type=whole, nargs="+", default=[1, 8], help="prompts at once (1 8)")
    parser.add_argument("--long-prompt", type=whole, default=4096, help="its first token is timed (4096)")
    parser.add_argument("--compile", action="store_true", help="measure our compiled step too")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="of transformers (all)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "both"], default="both", help="(both)")
    parser.add_argument("--threads", type=whole, default=2, help="CPU threads of each process (2)")
    parser.add_argument("--rounds", type=whole, default=3, help="turns of each process (3)")
    parser.add_argument("--model", help="an architecture such as configs/model/gptoss_73m.yaml; else these sizes:")
    sizes = {"layers": 4, "heads": 8, "kv-heads": 4, "head-dim": 32, "vocab-size": 8192, "hidden-size": 256}
    for name, value in {**sizes, "intermediate-size": 512, "num-experts": 8, "top-k": 2}.items():
        parser.add_argument(f"--{name}", type=whole, default=value, help=f"({value})")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--export", help=argparse.SUPPRESS)
    add_quick(parser, argv, **QUICK)


def main(arguments: argparse.Namespace, argv: list[str], script: str, fields: dict) -> int:
    """Measure, and print the comparison; return the exit code.

    Args:
        arguments: The parsed command line.
        argv: The command line itself, which workers get too.
        script: The file that workers run.
        fields: The architecture that the sizes of the command line give.
    """
    if arguments.worker:
        work(arguments)
        return 0
    precisions = ["fp32", "bf16"] if arguments.precision == "both" else [arguments.precision]
    with tempfile.TemporaryDirectory() as temporary:
        folder = f"{temporary}/model"
        about = export(arguments, fields, folder)
        for precision in precisions:
            workers = {}
            try:
                for name in (*ours_of(arguments), *arguments.peers):
                    line = [script, *argv, "--precision", precision, "--worker", name, "--export", folder]
                    workers[name] = start_worker(line, arguments.threads)
                done = take_turns(arguments, precision, workers)
            finally:
                for worker in workers.values():
                    worker.kill()
            peers = [name for name in arguments.peers if name in workers]
            report(arguments, peers, f"{precision}, {about}", done, exact=precision == "fp32")
    return 0


def export(arguments: argparse.Namespace, fields: dict, folder: str) -> str:
    """Write a model with random weights as transformers reads it, and return what it is, in words."""
    from gptoss_dist import GptOss, ModelConfig, save_pretrained
    from gptoss_dist.model.init import initialize

    config = ModelConfig.from_yaml(arguments.model) if arguments.model else ModelConfig(**fields)
    config.initializer_range = 0.1  # with GPT-OSS's 0.02 logits are so close together that rounding decides
    model = GptOss(config)
    initialize(model, seed=0)
    save_pretrained(model, folder)
    return (
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {config.num_hidden_layers} layers of "
        f"{config.hidden_size}, {config.num_local_experts} experts (top {config.num_experts_per_tok}) of "
        f"{config.intermediate_size}, vocabulary {config.vocab_size:,}"
    )


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Return what a turn may time; the long prompt is last."""
    decoding = [Case(batch, arguments.prompt, arguments.new_tokens) for batch in arguments.batch_sizes]
    return [*decoding, Case(1, arguments.long_prompt, 1)]


def take_turns(
    arguments: argparse.Namespace, precision: str, workers: dict[str, subprocess.Popen]
) -> list[dict[tuple[str, Case], dict]]:
    """Return what each round found, by worker and case. Every second round takes the workers in the reverse order."""
    done: list[dict] = []
    for number in rounds(arguments.rounds + 1):
        found = {}
        for index, case in enumerate(cases(arguments)):
            for name in sorted(workers, reverse=bool(number % 2)):
                found[name, case] = turn(workers[name], index)
                if "failed" in found[name, case]:
                    print(f"{precision} {label(name)} does not work here: {found[name, case]['failed']}")
                    workers.pop(name).kill()
                    continue
                first, rest = found[name, case]["first"], found[name, case]["rest"]
                warms_up = " (warms up)" if not done else ""
                progress(f"{precision} {name}: {case}: first {first:.3g} s, others {rest:.3g} s{warms_up}")
        done.append(found)
    return done


def report(arguments: argparse.Namespace, peers: list[str], about: str, done: list[dict], exact: bool) -> None:
    """Print times, ratios and how much of the text is the same; the first round does not count.

    Raises:
        SystemExit: Nothing of transformers works, or the text has to be the same (`exact`) and is not.
    """
    if not peers:
        raise SystemExit("benchmark.py: nothing to compare with: see above why")
    timed, names = done[1:], (*ours_of(arguments), *peers)
    print(f"{about}; {arguments.threads} threads, {len(timed)} rounds")
    for case in cases(arguments):
        key = "rest" if case.new > 1 else "first"

        def seconds(name: str) -> list[float]:
            return [found[name, case][key] for found in timed]  # noqa: B023

        print(f"  {case}: {'tokens per second from the first on' if case.new > 1 else 'seconds to the first token'}")
        for name in names:
            median = statistics.median(seconds(name))
            value = f"{case.batch * (case.new - 1) / median:12,.1f} tok/s" if case.new > 1 else f"{median:12.3f} s"
            print(f"    {label(name):<32}{value}{compiled_in(done, name, case)}{agreement(done, name, case)}")
        best = min(peers, key=lambda name: statistics.median(seconds(name)))
        for name in ours_of(arguments):
            ratio = Spread.of_ratios(seconds(best), seconds(name))
            print(f"    {name} is {ratio:.2f} times as fast as {label(best)}")
    last = done[-1]
    different = [
        f"{label(n)}, {c}" for n in names for c in cases(arguments) if last[n, c]["ids"] != last[OURS, c]["ids"]
    ]
    if different and exact:
        raise SystemExit(f"benchmark.py: other text than ours: {'; '.join(different)}")


def ours_of(arguments: argparse.Namespace) -> list[str]:
    """Return our workers."""
    return [OURS, COMPILED] if arguments.compile else [OURS]


def label(name: str) -> str:
    """Return what a worker is called in the report."""
    return name if name.startswith(OURS) else f"transformers {name}"


def compiled_in(done: list[dict], name: str, case: Case) -> str:
    """Say what the first round of a compiled step took longer than the others."""
    longer = done[0][name, case]["rest"] - statistics.median(found[name, case]["rest"] for found in done[1:])
    return f"   ({longer:.0f} s longer at first)" if longer > 2 else ""


def agreement(done: list[dict], name: str, case: Case) -> str:
    """Say how many tokens a worker and ours agree on before they differ, in the mean over the batch."""
    ours, theirs = (done[-1][n, case]["ids"] for n in (OURS, name))
    same = [next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), case.new) for pair in zip(ours, theirs)]
    return "" if min(same) == case.new else f"   (text differs after {statistics.mean(same):.0f} tokens)"


def work(arguments: argparse.Namespace) -> None:
    """Work as a worker: each line of standard input is the number of a case."""
    import torch

    torch.set_num_threads(arguments.threads)
    generate = None
    for index in map(int, sys.stdin):
        if generate is None:
            generate = (ours if arguments.worker.startswith(OURS) else theirs)(arguments)
        case = cases(arguments)[index]
        generator = torch.Generator().manual_seed(index)
        prompts = torch.randint(0, 256, (case.batch, case.prompt), generator=generator)
        stamps: list[float] = []
        begin = time.perf_counter()
        try:
            output = generate(prompts, case.new, lambda: stamps.append(time.perf_counter()))  # noqa: B023
        except Exception as error:
            if arguments.worker.startswith(OURS):
                raise
            print(json.dumps({"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}), flush=True)
            continue
        end = time.perf_counter()
        found = {"first": stamps[0] - begin, "rest": end - stamps[0], "ids": output[:, case.prompt :].tolist()}
        print(json.dumps(found), flush=True)


def dtype_of(arguments: argparse.Namespace):
    """Return the type of the weights."""
    import torch

    return torch.bfloat16 if arguments.precision == "bf16" else torch.float32


def ours(arguments: argparse.Namespace) -> Callable:
    """Return our greedy generation: (prompts, new tokens, what to call after each token) -> prompts and new tokens."""
    import numpy as np
    import torch

    from gptoss_dist.checkpoint import open_pretrained
    from gptoss_dist.distributed.processes import init_distributed
    from gptoss_dist.inference import GREEDY, complete

    class Letters:
        """Stands in for a tokenizer, without which there is no text to show: every token is a letter."""

        def ids_without_token(self, vocab_size):
            return np.empty(0, np.int64)

        def decode_bytes(self, ids):
            return b"x" * len(ids)

    init_distributed()  # memory is kept, as in training
    model = open_pretrained(arguments.export).build(dtype_of(arguments), "cpu").eval()

    def run(prompts, new, on_token):
        found = complete(
            model,
            prompts.tolist(),
            GREEDY,
            max_new_tokens=new,
            tokenizer=Letters(),
            on_text=lambda number, _: None if number else on_token(),
            compile=True if arguments.worker == COMPILED else "auto",
        )
        return torch.cat([prompts, torch.tensor([one.ids for (one,) in found])], dim=1)

    return run


def theirs(arguments: argparse.Namespace) -> Callable:
    """Return transformers' greedy generation with the experts, and the kind of cache, that the worker is called by."""
    import torch
    from transformers import AutoModelForCausalLM, CompileConfig
    from transformers.generation.streamers import BaseStreamer

    experts, *static = arguments.worker.split()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.export,
        dtype=dtype_of(arguments),
        attn_implementation="eager",
        experts_implementation="grouped_mm" if experts == "batched_mm" else experts,
    ).eval()
    options: dict[str, object] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if static:
        compile_config = CompileConfig(mode="default")
        compile_config._compile_all_devices = True
        options |= {"cache_implementation": "static", "compile_config": compile_config}

    @contextlib.contextmanager
    def decode_by_batched_mm():  # what transformers does on other devices
        model.set_experts_implementation("batched_mm")
        try:
            yield
        finally:
            model.set_experts_implementation("grouped_mm")

    if experts == "batched_mm":
        model._optimize_model_for_decode = decode_by_batched_mm

    class Streamer(BaseStreamer):
        """Calls back for every token; transformers hands over the prompt first."""

        def __init__(self, on_token):
            self.calls, self.on_token = 0, on_token

        def put(self, value):
            self.calls += 1
            if self.calls > 1:
                self.on_token()

        def end(self):
            pass

    def generate(prompts, new, on_token):
        with torch.inference_mode():
            return model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=new,
                streamer=Streamer(on_token),
                **options,
            )

    return generate
