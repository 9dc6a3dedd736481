"""Trace layouts and train them, in each process of one launch: what the planner foresees beside what is there.

torchrun ... tests/support/foreseen.py CASES.json FOLDER
"""

import dataclasses
import gc
import json
import os
import sys
from pathlib import Path

import torch

from gptoss_dist.distributed.processes import Ranks, init_distributed, shut_down
from gptoss_dist.engine import Engine, lay_out_engine
from gptoss_dist.planner.tracing.recorder import Operator, Recorder
from gptoss_dist.planner.tracing.trace import Workload, trace_step
from gptoss_dist.train.objectives import next_token_prediction
from gptoss_dist.train.start import engine_settings
from tests.support.layouts import Case
from tests.support.reference import LR

SEQ_LEN, STEPS = 16, 3  # of the real steps the last is compared


def collectives(operators: list[Operator]) -> list:
    """Every collective of some operators in its order: name, ranks, bytes sent."""
    return [[o.name.split(".")[1], list(o.group), o.sent] for o in operators if o.group]


def foresee(case: Case, rank: int) -> dict:
    """Trace the step of one rank."""
    trace = trace_step(engine_settings(case.config()), Workload(SEQ_LEN, case.world, next_token_prediction, rank=rank))
    return {"holds": trace.holds, "collectives": collectives(trace.step)}


def unnamed(recorder: Recorder, engine: Engine) -> int:
    """Return the bytes of all memory that is there and that `Engine.held` does not name, by what allocated it."""
    gc.collect()  # graphs of the backward pass that hold each other
    now = len(recorder.operators)
    for tensors in engine.held().values():
        recorder.adopt(tensors, "held")
    return sum(storage.bytes_at(now) for storage in recorder.storages if storage.role != "held")


def train(case: Case, ranks: Ranks) -> dict:
    """Train, and return what one rank held between the last backward pass and its update, and all that it sent."""
    settings = engine_settings(case.config())
    engine = lay_out_engine(settings, ranks, next_token_prediction)
    recorder = Recorder(settings.model.vocab_size)
    generator = torch.Generator().manual_seed(ranks.rank)
    shape = (settings.train.gradient_accumulation, settings.train.micro_batch_size, SEQ_LEN)
    with recorder:
        engine.materialize()
        for _ in range(STEPS):
            begin = len(recorder.operators)
            tokens = torch.randint(0, settings.model.vocab_size, shape, generator=generator)
            sums = engine.forward_backward([{"input_ids": x, "labels": x.roll(-1, 1)} for x in tokens])
            holds, rest = engine.holds(), unnamed(recorder, engine)
            skipped = engine.update(sums, LR).skipped
    assert not skipped
    return {"holds": holds, "unnamed": rest, "collectives": collectives(recorder.operators[begin:])}


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = [Case(**values) for values in json.loads(Path(sys.argv[1]).read_text())]
    rank, folder = int(os.environ.get("RANK", 0)), Path(sys.argv[2])
    traces = [foresee(case, rank) for case in cases]  # first, so that what one left behind would meet the real steps
    ranks = init_distributed()
    for case, foreseen in zip(cases, traces):
        result = {"foreseen": foreseen, "there": train(case, ranks)}
        (folder / f"{case.name}.{rank}.json").write_text(json.dumps(result))
    shut_down()
