"""The real training step of any layout, run on tensors that hold nothing: what it computes, sends and keeps.

`trace_step` builds the engine of a run as rank R of a world of N processes, with a process group that reaches nobody
and tensors that have shapes and no memory, and runs steps with it. So `parallelize`, FSDP2, DeepSpeed, the model and
its back ends are those that will run, and what a `Recorder` sees is what they will do: a 120B model on 512 GPUs takes
seconds and megabytes here.

Three things are made up, because tensors without values cannot say them:

- Routing is balanced: every expert gets the same number of tokens, so every all-to-all brings as many as it takes.
- Whatever else the host reads is answered alike (`HostReads`): labels are all valid, no activation is near its clamp,
  and gradients are finite.
- For a GPU the tensors are told apart from a CPU's by what they answer when asked for their device (`_OnCuda`): what
  chooses between ways to compute then chooses as it would there. Below torch's dispatcher they stay on the CPU.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.engine import Engine, EngineSettings, Objective, engine_kind, lay_out_engine
from gptoss_dist.engine.zero_settings import zero_stage
from gptoss_dist.model.transformer import LossSums
from gptoss_dist.ops import cross_entropy
from gptoss_dist.ops.attention.documents import locate_documents_of_runs
from gptoss_dist.ops.experts import activation
from gptoss_dist.parallel.mesh import DeviceLayout
from gptoss_dist.parallel.ring import Split
from gptoss_dist.planner.tracing.deepspeed import HostReads, answered, globals_put_back
from gptoss_dist.planner.tracing.recorder import Operator, Recorder, Storage


@dataclass(frozen=True)
class Workload:
    """What one process is given in a step, and where it stands."""

    seq_len: int
    world_size: int
    objective: Objective
    capability: tuple[int, int] | None = None
    """CUDA's compute capability of the devices; None for CPUs."""
    rank: int = 0
    documents: bool = False
    """Whether batches say where documents end (`DataConfig.masks_documents`)."""
    memory_only: bool = False
    """Leave out what a CPU computes in thousands of operators on parts that fit into its cache: they work in place, so
    that memory and traffic are the same, and time cannot be told."""


@dataclass(frozen=True)
class Trace:
    """One recorded step of one process."""

    operators: list[Operator]
    storages: list[Storage]
    begin: int
    """Index of the step's first operator."""
    holds: dict[str, int]
    """Bytes by what they are for, between the backward pass and the update (`Engine.holds`)."""
    layout: DeviceLayout

    @property
    def step(self) -> list[Operator]:
        """The operators of the step."""
        return self.operators[self.begin :]

    @property
    def collectives(self) -> list[Operator]:
        """The collectives of the step."""
        return [operator for operator in self.step if operator.group]


def trace_step(settings: EngineSettings, workload: Workload, *, warm_up: bool = False) -> Trace:
    """Record one optimizer step of one process of a world that is not there.

    Args:
        settings: What the engine reads of the configuration.
        workload: What the process is given.
        warm_up: Run a step before the recorded one: twice the time, to see that it makes no difference. ZeRO 3, where
            it does, is always warmed up.

    Raises:
        ValueError: The settings do not fit each other or the number of processes.
    """
    reads = HostReads()
    with _world(workload) as ranks, _prepared_deepspeed(settings, ranks, reads):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        recorder = Recorder(settings.model.vocab_size, mode, reads)

        def objective(model: nn.Module, batch: dict[str, Tensor]) -> LossSums:
            recorder.phase = "forward"
            return workload.objective(model, batch)

        engine = lay_out_engine(settings, ranks, objective)
        with mode, _answers(settings, workload), recorder, _without_questions(recorder):
            engine.materialize(initial=False)
            _adopt_held(recorder, engine)
            for last in _steps(settings, warm_up):
                begin = len(recorder.operators)
                batches = [_batch(settings, workload) for _ in range(settings.train.gradient_accumulation)]
                recorder.adopt([t for batch in batches for t in batch.values()], "inputs")
                sums = engine.forward_backward(batches)
                recorder.phase = "update"
                if last:
                    _adopt_held(recorder, engine)
                    holds = engine.holds()
                engine.update(sums, 1e-4)
                del sums, batches
        return Trace(recorder.operators, recorder.storages, begin, holds, engine.layout)


def _steps(settings: EngineSettings, warm_up: bool) -> list[bool]:
    """Return, for each step that is run, whether it is the one to record.

    ZeRO 3 notes the order of its parameters in one micro-batch, compares it between ranks in the next, and from then on
    gathers ahead and keeps what it can: no micro-batch before the third is like those that follow.
    """
    if engine_kind(settings.engine) == "deepspeed" and zero_stage(settings.engine) == 3:
        return [False] * math.ceil(2 / settings.train.gradient_accumulation) + [True]
    return [False, True] if warm_up else [True]


def _adopt_held(recorder: Recorder, engine: Engine) -> None:
    for role, tensors in engine.held().items():
        recorder.adopt(tensors, role)


@contextlib.contextmanager
def _world(workload: Workload) -> Iterator[Ranks]:
    if dist.is_initialized():
        raise RuntimeError("a step can only be traced in a process that is in no process group")
    dist.init_process_group("fake", store=FakeStore(), rank=workload.rank, world_size=workload.world_size)
    try:
        yield Ranks(workload.rank, workload.rank, workload.world_size, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _prepared_deepspeed(settings: EngineSettings, ranks: Ranks, reads: HostReads) -> Iterator[None]:
    """Prepare DeepSpeed for a trace, if it is the engine; to import it takes seconds."""
    if engine_kind(settings.engine) != "deepspeed":
        yield
        return
    from gptoss_dist.engine.deepspeed import import_deepspeed

    with patch.dict(os.environ):
        import_deepspeed(ranks)
        with globals_put_back(), answered(reads), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Accessing the data pointer of FakeTensor"
            )  # to see if it is aligned
            yield


@contextlib.contextmanager
def _answers(settings: EngineSettings, workload: Workload) -> Iterator[None]:
    split = Split(workload.seq_len, degree := settings.parallel.context_parallel)
    mine = workload.seq_len if degree == 1 else split.tokens_of(workload.rank % degree)
    tokens = settings.train.micro_batch_size * mine
    rows = tokens * settings.model.num_experts_per_tok

    def tolist(counts: FakeTensor) -> list:
        """Return counts of rows as they are if the routing is balanced; the shared expert's are int64 and one.

        Where documents are located, every sample is one: none decreases, one in each, as long as it.
        """
        if sys._getframe(1).f_code.co_name == locate_documents_of_runs.__name__:
            runs = (counts.shape[0] - 1) // 2
            return [0, *[settings.train.micro_batch_size, workload.seq_len] * runs]
        if counts.is_floating_point():
            return torch.full(counts.shape, 0.5).tolist()
        parts = counts.shape[-1]
        total = tokens if parts == 1 and counts.dtype == torch.int64 else rows
        one = [total // parts + (index < total % parts) for index in range(parts)]
        return one if counts.dim() == 1 else [one] * counts.shape[0]

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(FakeTensor, "tolist", tolist))
        # DeepSpeed moves the module to the device where it is; torch would swap its parameters, which fake ones refuse.
        stack.enter_context(patch.object(torch.nn.Module, "to", lambda module, *_, **__: module))
        if workload.memory_only:
            for owner, name in (
                (activation.BetweenGemms, "forward"),
                (activation.BetweenGemms, "backward"),
                (cross_entropy, "_add_weight_gradient"),
            ):
                stack.enter_context(patch.object(owner, name, lambda *_: None))
            # Chunks share their buffers: two of them take as much memory as the thousands of a large batch.
            chunks = cross_entropy._chunks
            stack.enter_context(patch.object(cross_entropy, "_chunks", lambda *sizes: chunks(*sizes)[:2]))
        if (capability := workload.capability) is not None:
            stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda *_: capability))
            stack.enter_context(patch.object(FakeTensor, "device", property(_answered_device)))
            stack.enter_context(_OnCuda())
        yield


@contextlib.contextmanager
def _without_questions(recorder: Recorder) -> Iterator[None]:
    """Record nothing while DTensor asks what shape a result would have, which it does by computing it in the mode."""
    ask = ShardingPropagator._propagate_tensor_meta_non_cached

    def unrecorded(*args, **kwargs):
        recorder.paused = True
        try:
            return ask(*args, **kwargs)
        finally:
            recorder.paused = False

    with patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", unrecorded):
        yield


def _answered_device(tensor: FakeTensor) -> torch.device:
    """Return where a tensor is: a GPU, if it is the code of this project that asks; torch itself is told the truth."""
    asker = sys._getframe(1).f_globals.get("__name__", "")
    true = _true_device(tensor)
    return torch.device("cuda", 0) if asker.startswith("gptoss_dist.") and true.type == "cpu" else true


_true_device = FakeTensor.device.fget  # type: ignore[attr-defined]


class _OnCuda(TorchDispatchMode):
    """What is to be made on a GPU is made on the CPU, and grouped products have a shape in every precision."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = kwargs | {"device": torch.device("cpu")}
        if function is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # torch's shape function knows bf16 only; its kernels know more.
            a, b, *rest = args
            return function(a.to(torch.bfloat16), b.to(torch.bfloat16), *rest, **kwargs).to(a.dtype)
        return function(*args, **kwargs)


def _is_cuda(value: object) -> bool:
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, torch.device) and value.type == "cuda"


def _batch(settings: EngineSettings, workload: Workload) -> dict[str, Tensor]:
    shape = (settings.train.micro_batch_size, workload.seq_len)
    names = ("input_ids", "labels", "document_ids") if workload.documents else ("input_ids", "labels")
    return {name: torch.zeros(shape, dtype=torch.int64) for name in names}
