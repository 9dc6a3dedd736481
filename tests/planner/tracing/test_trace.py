"""A trace is the same every time, and leaves the process as it was, whatever went wrong."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator

from gptoss_dist.config import EngineConfig, ParallelConfig, load_config
from gptoss_dist.engine import EngineSettings
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.ops import cross_entropy
from gptoss_dist.ops.experts import activation
from gptoss_dist.planner.tracing.memory import memory_timeline
from gptoss_dist.planner.tracing.trace import Trace, Workload, trace_step
from gptoss_dist.train.objectives import next_token_prediction
from gptoss_dist.train.start import engine_settings
from tests.support.ranks import MODEL

pytestmark = pytest.mark.heavy


def settings(kind: str) -> EngineSettings:
    made = EngineSettings(ModelConfig(**MODEL), parallel=ParallelConfig(expert_parallel=2))
    made.train.micro_batch_size = 2
    if kind != "fsdp":
        made.engine = EngineConfig(kind="deepspeed", zero_stage=int(kind[-1]))
    return made


def patched() -> tuple:
    """Everything of others that a trace replaces while it runs."""
    return (
        FakeTensor.__dict__.get("tolist", None),
        FakeTensor.__dict__["device"],
        torch.nn.Module.to,
        torch.cuda.get_device_capability,
        torch.UntypedStorage.resize_,
        ShardingPropagator._propagate_tensor_meta_non_cached,
        activation.BetweenGemms.forward,
        activation.BetweenGemms.backward,
        cross_entropy._chunks,
        dict(os.environ),
        torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
    )


def summary(trace: Trace) -> list:
    return [(o.name, o.phase, o.flops, o.read, o.written, o.shapes, o.group, o.sent) for o in trace.step]


@pytest.mark.parametrize(("kind", "capability"), [("fsdp", (9, 0)), ("zero-2", None)], ids=["cuda-fsdp", "cpu-zero-2"])
def test_two_traces_agree_and_nothing_stays_behind(kind, capability):
    before = patched()
    workload = Workload(32, 4, next_token_prediction, capability, memory_only=capability is None)
    first, second = (trace_step(settings(kind), workload) for _ in range(2))
    assert summary(first) == summary(second) and first.holds == second.holds
    assert memory_timeline(first).peaks() == memory_timeline(second).peaks()
    assert patched() == before and not dist.is_initialized()


@pytest.mark.parametrize("kind", ["fsdp", "zero-2"])
def test_an_error_in_the_middle_leaves_nothing_behind(kind):
    before = patched()
    calls = []

    def failing(model, batch):
        calls.append(0)
        next_token_prediction(model, batch)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trace_step(settings(kind), Workload(32, 4, failing, (9, 0), memory_only=True))
    assert calls and patched() == before and not dist.is_initialized()
    assert torch.ones(2).add(1).tolist() == [2, 2]
    assert trace_step(settings(kind), Workload(32, 4, next_token_prediction)).step


def test_it_refuses_to_run_inside_of_a_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="process group"):
            trace_step(settings("fsdp"), Workload(32, 4, next_token_prediction))
        assert dist.get_backend() == "gloo"
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [("pretrain_120b_h100x512", 512), ("pretrain_20b_h100x64", 64)])
def test_the_largest_configurations_are_traced_whole(name, ranks):
    """Every layer of a micro-batch; a minute is what the planner allows itself."""
    whole = engine_settings(load_config(f"configs/{name}.yaml"))
    whole.train.gradient_accumulation = 1
    begin = time.monotonic()
    trace = trace_step(whole, Workload(4096, ranks, next_token_prediction, (9, 0)))
    seconds = time.monotonic() - begin
    layers = whole.model.num_hidden_layers
    assert sum(o.name.startswith("c10d.alltoall") and o.phase == "forward" for o in trace.step) >= 2 * layers
    assert {len(o.group) for o in trace.collectives} >= {trace.layout.expert_parallel}
    assert seconds < 120, seconds  # twice what is allowed, since other tests may run beside it
