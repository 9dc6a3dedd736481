"""Trace layouts and train them, in each process of one launch: what the planner foresees beside what is there.

torchrun ... tests/support/foreseen.py CASES.json FOLDER
"""

import dataclasses
import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch

from gptoss_dist.distributed.processes import Ranks, init_distributed, shut_down
from gptoss_dist.engine import lay_out_engine
from gptoss_dist.planner.tracing.recorder import Operator, Recorder
from gptoss_dist.planner.tracing.trace import Trace, Workload, trace_step
from gptoss_dist.train.objectives import next_token_prediction
from gptoss_dist.train.start import engine_settings
from tests.support.layouts import Case
from tests.support.reference import LR


@dataclasses.dataclass
class Foreseen(Case):
    """A layout whose step is traced and run."""

    seq_len: int = 16
    steps: int = 1
    """The last one is compared; the first ones are warm-up. One or two."""


def collectives(operators: list[Operator]) -> list:
    """Every collective of some operators in its order: name, ranks, bytes sent."""
    return [[o.name.split(".")[1], list(o.group), o.sent] for o in operators if o.group]


def foresee(case: Foreseen, rank: int) -> Trace:
    """Trace the step of one rank."""
    workload = Workload(case.seq_len, case.world, next_token_prediction, rank=rank)
    return trace_step(engine_settings(case.config()), workload, warm_up=case.steps > 1)


def train(case: Foreseen, ranks: Ranks) -> dict:
    """Train and return what one rank held between the last backward pass and its update, and all that it sent."""
    settings = engine_settings(case.config())
    engine = lay_out_engine(settings, ranks, next_token_prediction)
    recorder = Recorder(settings.model.vocab_size)
    generator = torch.Generator().manual_seed(ranks.rank)
    shape = (settings.train.micro_batch_size, case.seq_len)
    with recorder:
        engine.materialize()
        for _ in range(case.steps):
            begin = len(recorder.operators)
            batches = []
            for _ in range(settings.train.gradient_accumulation):
                tokens = torch.randint(0, settings.model.vocab_size, shape, generator=generator)
                batches.append({"input_ids": tokens, "labels": tokens.roll(-1, 1)})
            sums = engine.forward_backward(batches)
            holds = engine.holds()
            named = {t.untyped_storage()._cdata for tensors in engine.held().values() for t in tensors}
            names = {recorder._numbers[block] for block in named if block in recorder._numbers}
            alive = [s for s in recorder.storages if s.bytes_at(len(recorder.operators))]
            unnamed = [s.bytes_at(len(recorder.operators)) for s in alive if s.number not in names]
            seen = sum(recorder.storages[n].bytes_at(len(recorder.operators)) for n in names)
            result = engine.update(sums, LR)
    return {
        "holds": holds,
        "seen": seen,
        "unnamed": sorted(unnamed, reverse=True),
        "collectives": collectives(recorder.operators[begin:]),
        "skipped": result.skipped.item(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = [Foreseen(**values) for values in json.loads(Path(sys.argv[1]).read_text())]
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[2])
    traces = [foresee(case, rank) for case in cases]  # which must leave nothing behind in this process
    ranks = init_distributed()
    for case, trace in zip(cases, traces):
        there = train(case, ranks)
        foreseen = {"holds": trace.holds, "collectives": collectives(trace.step)}
        (folder / f"{case.name}.{rank}.json").write_text(json.dumps({"foreseen": foreseen, "there": there}))
    shut_down()
