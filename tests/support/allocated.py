"""Train two steps and print the most bytes that the second one held, by torch's allocator, beside what was foreseen.

python tests/support/allocated.py CASE.json
"""

import json
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from gptoss_dist.distributed.processes import init_distributed, shut_down
from gptoss_dist.engine import Engine, EngineSettings, build_engine
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.planner.tracing.memory import memory_timeline
from gptoss_dist.planner.tracing.trace import Workload, trace_step
from gptoss_dist.train.objectives import next_token_prediction


def foresee(settings: EngineSettings, seq_len: int, memory_only: bool) -> int:
    """The peak that the planner foresees."""
    workload = Workload(seq_len, 1, next_token_prediction, memory_only=memory_only)
    timeline = memory_timeline(trace_step(settings, workload))
    return max(sum(kinds.values()) for kinds in timeline.peaks().values())


def step(engine: Engine, settings: EngineSettings, seq_len: int) -> None:
    """Train one step on random tokens."""
    size = settings.train.micro_batch_size
    tokens = torch.randint(0, settings.model.vocab_size, (size, seq_len + 1))
    batch = {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    engine.update(engine.forward_backward([batch] * settings.train.gradient_accumulation), 1e-4)


def measure(settings: EngineSettings, seq_len: int) -> int:
    """The peak of a real step: what is held between steps, and what torch's allocator hands out on top."""
    engine = build_engine(settings, init_distributed(), next_token_prediction)
    step(engine, settings, seq_len)
    held = sum(engine.holds().values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(engine, settings, seq_len)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return held + most


if __name__ == "__main__":
    case = json.loads(Path(sys.argv[1]).read_text())
    settings = EngineSettings(ModelConfig(**case["model"]))
    for name, value in case["train"].items():
        setattr(settings.train, name, value)
    foreseen = {str(only): foresee(settings, case["seq_len"], only) for only in (False, True)}
    print(json.dumps({"foreseen": foreseen, "measured": measure(settings, case["seq_len"])}), flush=True)
    shut_down()
