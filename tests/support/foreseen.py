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

SEQ_LEN, STEPS = 16, 2  # of the real steps the last is compared, with two micro-batches before it under ZeRO 3


@dataclasses.dataclass
class Foreseen(Case):
    """A layout whose step is traced and run."""

    every_rank: bool = False
    """Whether all ranks are traced; otherwise two are, the last among them, which has the least."""
    slow: bool = False
    """Whether it takes part in the slow tests only."""

    def traced(self) -> set[int]:
        """Return the ranks that are traced."""
        return set(range(self.world)) if self.every_rank else {len(self.name) % self.world, self.world - 1}


def collectives(operators: list[Operator]) -> list:
    """Every collective of some operators in its order: name, ranks, bytes sent."""
    return [[o.name.split(".")[1], list(o.group), o.sent] for o in operators if o.group]


def foresee(case: Case, rank: int) -> dict:
    """Trace the step of one rank."""
    trace = trace_step(engine_settings(case.config()), Workload(SEQ_LEN, case.world, next_token_prediction, rank=rank))
    return {"holds": trace.holds, "collectives": collectives(trace.step)}


def unnamed(recorder: Recorder, engine: Engine) -> int:
    """Return the bytes of all memory that was allocated, is there still, and is not named by `Engine.held`."""
    gc.collect()  # graphs of the backward pass that hold each other
    now = len(recorder.operators)
    for tensors in engine.held().values():
        recorder.adopt(tensors, "held")
    return sum(storage.bytes_at(now) for storage in recorder.storages if storage.role != "held")


def note_routing(engine: Engine) -> list:
    """Return a list that gets, for each layer, the rows that this process sends to each expert [R, E local]."""
    noted: list = []
    if engine.exchange is not None:
        counts = engine.exchange.counts

        def note(sent_RE: torch.Tensor):
            noted.append(sent_RE.tolist())
            return counts(sent_RE)

        engine.exchange.counts = note  # type: ignore[method-assign]
    return noted


def train(case: Case, ranks: Ranks) -> dict:
    """Train, and return what one rank held between the last backward pass and its update, and all that it sent."""
    settings = engine_settings(case.config())
    engine = lay_out_engine(settings, ranks, next_token_prediction)
    noted, recorder = note_routing(engine), Recorder(settings.model.vocab_size)
    generator = torch.Generator().manual_seed(ranks.rank // case.cp)
    shape = (settings.train.gradient_accumulation, settings.train.micro_batch_size, SEQ_LEN)
    with recorder:
        engine.materialize()
        for step in range(STEPS):
            begin = len(recorder.operators)
            noted.clear()
            tokens = torch.randint(0, settings.model.vocab_size, shape, generator=generator)
            sums = engine.forward_backward([{"input_ids": x, "labels": x.roll(-1, 1)} for x in tokens])
            holds = engine.holds()
            if step == STEPS - 1:
                rest = unnamed(recorder, engine)
            skipped = engine.update(sums, LR).skipped
    assert not skipped
    return {
        "holds": holds,
        "unnamed": rest - tokens.nbytes,
        "collectives": collectives(recorder.operators[begin:]),
        "sent_rows": list(noted),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # what was imported would be looked through again and again
    cases = [Foreseen(**values) for values in json.loads(Path(sys.argv[1]).read_text())]
    rank, folder = int(os.environ.get("RANK", 0)), Path(sys.argv[2])
    # All traces first: what one of them left behind would meet the real steps.
    traces = [foresee(case, rank) if rank in case.traced() else None for case in cases]
    ranks = init_distributed()
    for case, foreseen in zip(cases, traces):
        result = {"foreseen": foreseen, "there": train(case, ranks)}
        (folder / f"{case.name}.{rank}.json").write_text(json.dumps(result))
    shut_down()
