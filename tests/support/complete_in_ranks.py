"""Completions by a model that the processes of one launch share: `torchrun ... complete_in_ranks.py FOLDER EP`."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from gptoss_dist.distributed.processes import Ranks, init_distributed, shut_down
from gptoss_dist.engine import Engine
from gptoss_dist.inference import GREEDY, Sampling, complete
from gptoss_dist.parallel.traffic import SentBytes
from gptoss_dist.train.periodic import write_samples
from tests.support.layouts import Case
from tests.support.reference import LR, build, micro_batches

MODEL = {"initializer_range": 0.3, "num_hidden_layers": 2}
PROMPTS = [[5], [7, 8, 9] * 9, list(range(60, 77)), [7, 8]]
NEW = 50
"""About three times the window."""
STOPS = list(range(0, 101, 5))


def is_freed(engine: Engine) -> bool:
    """Whether no block holds gathered weights."""
    return all(isinstance(p, DTensor) for block in engine.model.blocks for p in block.parameters())


def written(engine: Engine, ranks: Ranks) -> list[list[int]]:
    """Ids of the samples that a training run writes."""
    config, texts = Case("", ranks.world_size, model=MODEL).config(), []
    config.sampling.prompts, config.sampling.max_new_tokens, config.sampling.temperature = ["0", "1"], 10, 0.0
    tokenizer = SimpleNamespace(
        encode=lambda text: np.array(PROMPTS[int(text)]),
        decode=list,
        decode_bytes=bytes,
        ids_without_token=lambda vocab_size: np.arange(101, vocab_size),
    )
    data = SimpleNamespace(training=SimpleNamespace(mixture=SimpleNamespace(tokenizer=tokenizer)))
    report = SimpleNamespace(samples=lambda step, found: texts.extend(found))
    write_samples(SimpleNamespace(config=config, ranks=ranks, engine=engine, data=data, report=report), 3, {})
    return texts


def main(folder: Path, expert_parallel: int) -> None:
    ranks = init_distributed()
    engine = build(Case("", ranks.world_size, ep=expert_parallel, model=MODEL).config(), ranks)
    report, sent = {}, {}

    def largest(number: int) -> int:
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    for name, context, new in (("kept", engine.keep_gathered(), NEW), ("freed", nullcontext(True), 10)):
        counter = SentBytes()
        with counter.counting(), context as fits:
            assert fits
            found = complete(engine.model, PROMPTS, GREEDY, max_new_tokens=new, prefill_chunk=28, logprobs=True)
        sent[name] = sum(n for operator, n in counter.by_name.items() if "allgather" in operator)
        report[name] = [[one.ids, one.logprobs] for (one,) in found]
    # Each rank its own prompts, which stop when they do; the last rank has one less.
    mine = PROMPTS[ranks.rank :: ranks.world_size][: 2 - ranks.rank]
    with engine.keep_gathered():
        found = complete(
            engine.model, mine, GREEDY, max_new_tokens=NEW, stop_ids=STOPS, prefill_chunk=5, largest=largest
        )
    report["own"] = [one.ids for (one,) in found]
    report["freed again"] = [is_freed(engine)]
    report["written"] = written(engine, ranks)
    # A rank without any prompt takes part, and nothing of this is left in training.
    complete(engine.model, PROMPTS[:1] if ranks.is_main else [], Sampling(), max_new_tokens=3, largest=largest)
    report["freed again"].append(is_freed(engine))
    engine.model.train()
    result = engine.update(engine.forward_backward(micro_batches(0, 2)), LR)
    report |= {"sent": sent, "loss": float(result.loss)}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(report))
    shut_down()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
