"""The code that runs on CUDA, run without a GPU: which operators a training step launches, and where the host waits.

A step of one process runs on tensors that have a shape, a type and no data, with the back ends that `auto` takes on a
GPU of the compute capability in question. Every shape and type has to fit, as on the GPU. There are two ways:

- on the meta device, with any build of torch: forward, backward and update, with the back ends chosen by name;
- on fake CUDA tensors, with the CUDA build of torch and no driver: the forward pass, in which `auto` chooses by itself.
  Backward stops there: autograd asks the driver for a context.

What is not the code of a GPU: megablocks' Triton kernels, for which their torch twins run; FSDP, of which only the cast
of the weights to the compute type is left; and copies of the results to the host. What operators compute is not seen,
nor whether a kernel is fast, nor whether it waits inside, but for what `DOCUMENTED` (`host_reads.py`) says of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gptoss_dist.config import ParallelConfig, TrainConfig
from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.engine.base import Engine, EngineSettings, StepResult, StepSums
from gptoss_dist.engine.fsdp import FsdpEngine
from gptoss_dist.engine.optimizer import build_optimizer
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.transformer import GptOss, LossSums
from gptoss_dist.ops.attention import kernel_op, sink_attention
from gptoss_dist.ops.backends import AUTO, choose
from gptoss_dist.ops.experts import grouped_experts
from gptoss_dist.ops.precision import DTYPES
from gptoss_dist.parallel.mesh import plan_layout
from gptoss_dist.parallel.parallelize import wrap_blocks
from gptoss_dist.planner.tracing.host_reads import GROUPED_MM, HostRead, HostReadWatch, Sizes, documented

NO_KERNEL = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split", "split_with_sizes"),
    *("unbind", "squeeze", "unsqueeze", "detach", "as_strided", "alias", "empty", "empty_like", "empty_strided"),
    *("new_empty", *kernel_op.KERNELS),
}
"""Operators that make a view or allocate memory, and custom ones that are listed by what they run."""
COLUMNS = 3


@dataclass(frozen=True)
class CudaTrace:
    """What a step on a GPU consists of, as far as it can be known without one."""

    model: ModelConfig
    parameters: int
    precision: str
    capability: tuple[int, int]
    seq_len: int
    micro_batch_size: int
    documents: bool
    checkpointing: int
    device: str
    """`meta`, or `cuda` for fake CUDA tensors."""
    backends: dict[str, str]
    """What `auto` takes on this capability, by operation."""
    phases: dict[str, dict[str, int]]
    """Calls of each operator in `forward`, `backward` and `update`, in the order of first use. Recomputation counts as
    `backward`, since it happens there."""
    host_reads: dict[HostRead, int]
    """How often the host waits, by the line that asks."""

    @property
    def operators(self) -> dict[str, int]:
        """Calls of each operator in the whole step, in the order of first use."""
        total: Counter[str] = Counter()
        for counts in self.phases.values():
            total.update(counts)
        return dict(total)

    @property
    def undocumented(self) -> list[HostRead]:
        """The host reads that `DOCUMENTED` does not know."""
        return [read for read in self.host_reads if documented(read) is None]


def trace_cuda(
    model: ModelConfig,
    *,
    precision: str,
    capability: tuple[int, int],
    seq_len: int,
    micro_batch_size: int,
    documents: bool = False,
    checkpointing: int = 0,
    device: str = "meta",
) -> CudaTrace:
    """Trace one training step of one process: one micro-batch forward and backward, clipping, and fused AdamW.

    Args:
        model: The architecture.
        precision: `bf16` or `fp32`, as `train.precision`.
        capability: Compute capability of the GPU, such as (9, 0) for an H100.
        seq_len: Tokens per sequence.
        micro_batch_size: Sequences.
        documents: Whether attention is to stay within documents.
        checkpointing: Recompute every n-th block in the backward pass, as `train.activation_checkpointing`.
        device: `meta`, or `cuda` for the forward pass alone on fake CUDA tensors.

    Raises:
        ValueError: A value is none of these, or fake CUDA tensors do not work with this build of torch.
        LocalError: There are more rows than megablocks' kernels can address.
        RuntimeError: The code does not fit together: torch's shape function of some operator refuses its arguments.
    """
    _check(precision, seq_len, micro_batch_size, checkpointing, device)
    train = TrainConfig(micro_batch_size=micro_batch_size, activation_checkpointing=checkpointing)
    train.precision = precision  # type: ignore[assignment]
    sizes = Sizes(micro_batch_size * seq_len, seq_len, model.num_experts_per_tok)
    watch = HostReadWatch(device, _answers(sizes))
    recorder = _Recorder(watch, capability)
    with _as_on_cuda(capability):
        backends = chosen_backends(model, precision)
        fake_mode = _fake_cuda_mode() if device == "cuda" else nullcontext()
        engine = _TracedEngine(EngineSettings(model, train), recorder, backends, fake_mode)
        with fake_mode, watch, recorder:
            engine.train_step(_micro_batch(micro_batch_size, seq_len, documents))
    return CudaTrace(
        model=model,
        parameters=sum(p.numel() for p in engine.model.parameters()),
        precision=precision,
        capability=capability,
        seq_len=seq_len,
        micro_batch_size=micro_batch_size,
        documents=documents,
        checkpointing=checkpointing,
        device=device,
        backends=backends,
        phases={name: dict(counts) for name, counts in recorder.phases.items() if counts},
        host_reads=dict(Counter(watch.reads)),
    )


def _check(precision: str, seq_len: int, micro_batch_size: int, checkpointing: int, device: str) -> None:
    if precision not in DTYPES:
        raise ValueError(f"precision={precision!r} is unknown; choose one of {', '.join(DTYPES)}")
    for name, value in (("seq_len", seq_len), ("micro_batch_size", micro_batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if checkpointing < 0:
        raise ValueError(f"checkpointing={checkpointing} must be at least 0, which recomputes nothing")
    if device not in ("meta", "cuda"):
        raise ValueError(f"device={device!r} cannot be traced; choose meta or cuda")
    if device == "cuda" and (reason := why_no_fake_cuda()):
        raise ValueError(f"device='cuda' {reason}; choose device='meta'")


def describe(trace: CudaTrace) -> str:
    """Return what a trace found, in words: one screen."""
    model = trace.model
    experts = f"{model.num_local_experts} experts ({model.num_experts_per_tok} per token)"
    documents = "several documents" if trace.documents else "one document"
    batch = f"{trace.micro_batch_size} x {trace.seq_len} tokens, {documents}"
    recomputed = f"every {trace.checkpointing}. block recomputed" if trace.checkpointing else "nothing recomputed"
    calls = ", ".join(f"{name} {sum(counts.values()):,}" for name, counts in trace.phases.items())
    launching = {name: count for name, count in trace.operators.items() if name not in NO_KERNEL}
    idle = sum(trace.operators.values()) - sum(launching.values())
    lines = [
        f"{trace.parameters:,} parameters: {model.num_hidden_layers} layers of {model.hidden_size}, {experts}",
        f"one step of one process: {batch} per sequence, {trace.precision}, {recomputed}",
        f"a GPU of compute capability {'.'.join(map(str, trace.capability))}, "
        f"traced on {'the meta device' if trace.device == 'meta' else 'fake CUDA tensors, the forward pass only'}",
        "back ends of auto: " + ", ".join(f"{operation} {name}" for operation, name in trace.backends.items()),
        f"calls of operators: {calls}; {idle:,} of them are views and allocations, not listed",
        "",
        *_in_columns([f"{name:<28}{count:>7,}" for name, count in launching.items()]),
        "",
        f"the host waits {sum(trace.host_reads.values())} times for the device or a copy:",
    ]
    for read, count in trace.host_reads.items():
        entry = documented(read)
        lines.append(f"{count:>5} x {read}")
        lines += [f"        {entry.often}:", f"        {entry.why}"] if entry else ["        UNDOCUMENTED"]
    return "\n".join(lines)


def _in_columns(cells: list[str]) -> list[str]:
    """Return lines of several cells, to be read column by column."""
    rows = -(-len(cells) // COLUMNS)
    return ["   ".join(cells[row::rows]) for row in range(rows)]


def why_no_fake_cuda() -> str | None:
    """Say why fake CUDA tensors do not work here, or None if they do."""
    if torch.version.cuda is None:
        return f"needs the CUDA build of torch, and this is {torch.__version__}"
    return None


def chosen_backends(model: ModelConfig, precision: str) -> dict[str, str]:
    """Return what `auto` takes on the CUDA device that torch believes in, by the tables of `ops/`."""
    dtype, cuda = DTYPES[precision], torch.device("cuda")
    expert_sizes = (model.hidden_size, model.intermediate_size)
    attention, experts = sink_attention, grouped_experts
    chosen = {
        "attention": choose(attention.BACKENDS, AUTO, attention.AUTO_ORDER, dtype, (model.head_dim,), cuda),
        "experts": choose(experts.BACKENDS, AUTO, experts.AUTO_ORDER["cuda"], dtype, expert_sizes, cuda),
    }
    if model.num_shared_experts:
        shared_sizes = (model.hidden_size, model.num_shared_experts * model.intermediate_size)
        order = experts.AUTO_ORDER["cuda"]
        chosen["shared expert"] = choose(experts.BACKENDS, AUTO, order, dtype, shared_sizes, cuda)
    return {operation: backend.name for operation, backend in chosen.items()}


@contextmanager
def _as_on_cuda(capability: tuple[int, int]) -> Iterator[None]:
    """Let torch believe in a GPU of this compute capability, and tensors without data take the place of its own."""
    from gptoss_dist.parallel.megablocks_compat import torch_twins

    with (
        torch_twins(),
        _replaced(torch.cuda, "get_device_capability", lambda device=None: capability),
        _replaced(FakeTensor, "tolist", Tensor.tolist),  # its own one asks item by item
    ):
        yield


def _fake_cuda_mode() -> FakeTensorMode:
    torch._C._ensureCUDADeviceGuardSet()  # a stand-in for the driver
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Set an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _answers(sizes: Sizes) -> Callable[[HostRead, Tensor], list | None]:
    def answer(read: HostRead, tensor: Tensor) -> list | None:
        entry = documented(read)
        return entry.answer(sizes, tensor) if entry is not None and entry.answer is not None else None

    return answer


def _micro_batch(micro_batch_size: int, seq_len: int, documents: bool) -> dict[str, Tensor]:
    """Return a micro-batch as the loader hands it out, on the CPU."""
    shape = (micro_batch_size, seq_len)
    names = ["input_ids", "labels", *(["document_ids"] if documents else [])]
    return {name: torch.zeros(shape, dtype=torch.int64) for name in names}


class _Recorder(TorchDispatchMode):
    """Counts operators by phase, those within our own custom operators too.

    It also tells the watch where `_grouped_mm` has no kernel of its own and waits inside (see `DOCUMENTED`).
    """

    def __init__(self, watch: HostReadWatch, capability: tuple[int, int]) -> None:
        super().__init__()
        self.watch, self.has_grouped_kernel = watch, capability[0] in (9, 10)
        self.phases: dict[str, Counter[str]] = {name: Counter() for name in ("forward", "backward", "update")}
        self.counts = self.phases["forward"]
        self._within: dict[tuple, Counter[str]] = {}

    @contextmanager
    def counting_into(self, counts: Counter[str]) -> Iterator[None]:
        """Count into these instead."""
        before, self.counts = self.counts, counts
        try:
            yield
        finally:
            self.counts = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, name = function.namespace, function.overloadpacket.__name__
        if namespace in ("prim", "profiler"):  # questions about a fake tensor, and marks
            return function(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            with self:  # below autograd these arrive whole: what they are made of counts
                return function.decompose(*args, **kwargs)
        full_name = name if namespace == "aten" else f"{namespace}::{name}"
        self.counts[full_name] += 1
        if full_name in kernel_op.KERNELS:
            return self._within_custom(function, full_name, args)
        if full_name == "_grouped_mm":
            return self._grouped_mm(function, *args, **kwargs)
        return function(*args, **kwargs)

    def _within_custom(self, function, name: str, args: tuple):
        """Run what a custom operator runs; return what its shape function says, which must be the same.

        Calls with the same shapes run the same operators, so that only the first of them is run.
        """
        claimed = function(*args)
        call = (name, *((tuple(a.shape), a.dtype) if isinstance(a, Tensor) else a for a in args))
        if call not in self._within:
            self._within[call] = Counter()
            with self, self.counting_into(self._within[call]), torch.no_grad():
                results = kernel_op.KERNELS[name](*args)
            described = [[(x.shape, x.dtype, x.stride()) for x in tensors] for tensors in (claimed, results)]
            if described[0] != described[1]:
                raise RuntimeError(f"{name}: its shape function says {described[0]}, its kernels give {described[1]}")
        self.counts.update(self._within[call])
        return claimed

    def _grouped_mm(self, function, a: Tensor, b: Tensor, *args, **kwargs) -> Tensor:
        if not (self.has_grouped_kernel and a.dtype == torch.bfloat16):
            self.watch.note(GROUPED_MM)
        # torch's shape function knows bf16 only.
        return function(a.to(torch.bfloat16), b.to(torch.bfloat16), *args, **kwargs).to(a.dtype)


class _TracedEngine(FsdpEngine):
    """The step of `FsdpEngine` on one process without FSDP, on tensors without data.

    Args:
        settings: What is trained.
        recorder: What counts its operators.
        backends: The back ends to choose by name; on CUDA `auto` chooses.
        fake_mode: The mode in which CUDA tensors are fake, or else the meta device is traced.
    """

    def __init__(
        self,
        settings: EngineSettings,
        recorder: _Recorder,
        backends: dict[str, str],
        fake_mode: AbstractContextManager,
    ) -> None:
        from gptoss_dist.parallel.experts import use_megablocks

        is_fake = isinstance(fake_mode, FakeTensorMode)
        device = torch.device("cuda" if is_fake else "meta")
        Engine.__init__(self, settings, Ranks(0, 0, 1, device), _next_token_prediction)  # FSDP's own sets up processes
        self.recorder = recorder
        self.layout = plan_layout(ParallelConfig(), settings.model.num_local_experts, 1)
        with torch.device("meta"):
            self.model = self.module = GptOss(settings.model)
        self.exchange = use_megablocks(self.model)
        wrap_blocks(self.model, settings.train)
        self._prepare_routers()
        if is_fake:
            with fake_mode:
                self.model.to_empty(device=device)
            self.model.tie()
            return
        for block in self.model.blocks:
            block.self_attn.backend = backends["attention"]
            block.mlp.experts.backend = backends["experts"]
            if block.mlp.shared_expert is not None:
                block.mlp.shared_expert.backend = backends["shared expert"]
        self.optimizer = build_optimizer(self.model, settings.optim)

    def train_step(self, batch: dict[str, Tensor]) -> None:
        """Run a step of one micro-batch; on fake CUDA tensors its forward pass."""
        passes = _Passes(self)
        dtype = DTYPES[self.settings.train.precision]
        if dtype == torch.float32:
            sums = passes([batch])
        else:
            weights = {name: p.to(dtype) for name, p in passes.named_parameters()}
            sums = torch.func.functional_call(passes, weights, ([batch],))
        if self.ranks.device.type == "meta":
            with self.recorder.counting_into(self.recorder.phases["update"]):
                self.update(sums, lr=self.settings.optim.lr)

    def _begin_micro_batch(self, last: bool) -> None:
        pass

    def _backward(self, loss: Tensor) -> None:
        if self.ranks.device.type == "meta":
            with self.recorder.counting_into(self.recorder.phases["backward"]):
                super()._backward(loss)

    def _to_host(self, result: StepResult) -> StepResult:
        return result  # pinned memory needs a driver


class _Passes(nn.Module):
    """The forward and backward passes of an engine as one module.

    So its weights can be replaced by their casts for all that happens in it, recomputation among it, as FSDP does.
    """

    def __init__(self, engine: _TracedEngine) -> None:
        super().__init__()
        self.model = engine.model
        self._run = engine.forward_backward

    def forward(self, micro_batches: list[dict[str, Tensor]]) -> StepSums:
        """Return what the engine returns."""
        return self._run(micro_batches)


def _next_token_prediction(model: nn.Module, batch: dict[str, Tensor]) -> LossSums:
    return model(batch["input_ids"], batch["labels"], document_ids_BT=batch.get("document_ids"))
