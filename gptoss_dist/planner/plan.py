"""What a run will need on given machines: memory, traffic, time, disk; from a trace of the step that will run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from data_pipeline.shards.megatron import token_dtype
from gptoss_dist.engine import EngineSettings, Objective
from gptoss_dist.parallel.mesh import plan_layout
from gptoss_dist.planner.flops import FlopCount, flops_per_token
from gptoss_dist.planner.hardware import Gpu, Network, Peak
from gptoss_dist.planner.parameters import ParameterCount, count_parameters, count_trained
from gptoss_dist.planner.timing.prices import DatasheetHardware, Hardware
from gptoss_dist.planner.timing.roofline import StepTime, extrapolate, simulate
from gptoss_dist.planner.tracing.memory import NO_MARGIN, Margin
from gptoss_dist.planner.tracing.reduced import TracedStep, Traffic, trace_model
from gptoss_dist.planner.tracing.trace import Workload

UNEVEN = 1.5
"""A routing whose effect on memory is printed: a process's rows over its even share."""


@dataclass(frozen=True)
class Machines:
    """What a run is planned for."""

    devices: int
    node_size: int
    """Devices per machine; consecutive ranks share one."""
    gpu: Gpu | None = None
    """None for CPUs, one process each, and for GPUs that the table does not have."""
    network: Network | None = None
    """What joins machines; None if there is one."""
    memory_bytes: float | None = None
    """Of one device, if it is not the datasheet's: of a CPU, the share of one process."""
    disk_bytes_per_s: float = 2e9
    """Of one machine, writing checkpoints."""
    hardware: Hardware | None = None
    """A calibrated device; None takes the GPU's datasheet."""
    cuda: tuple[int, int] | None = None
    """Compute capability of a GPU that the table does not have."""

    def __post_init__(self) -> None:
        if self.devices % self.node_size:
            raise ValueError(
                f"gpus={self.devices} do not fill machines of {self.node_size}; give --nodes that divides it"
            )

    @property
    def nodes(self) -> int:
        """Number of machines."""
        return self.devices // self.node_size

    @property
    def limit(self) -> float | None:
        """Bytes of one device, if they are known."""
        return self.memory_bytes or (self.gpu.memory_bytes if self.gpu is not None else None)

    @property
    def margin(self) -> Margin:
        """What a device needs beside the blocks of a step."""
        return Margin() if self.capability is not None else NO_MARGIN

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA's compute capability, by which back ends are chosen; None for CPUs.

        GPUs that are not NVIDIA's are traced as if they were Hopper's.
        """
        return self.cuda if self.gpu is None else self.gpu.capability or (9, 0)

    @property
    def name(self) -> str:
        """The machines in words."""
        many = "es" * (self.devices > 1)
        device = (
            self.gpu.name if self.gpu is not None else f"unknown GPU{many[1:]}" if self.cuda else f"CPU process{many}"
        )
        joined = f", {self.network.name}" if self.network is not None and self.nodes > 1 else ""
        machines = f"{self.nodes} machine{'s' * (self.nodes > 1)}"
        return f"{self.devices} {'x ' if self.gpu is not None else ''}{device} on {machines}{joined}"


@dataclass(frozen=True)
class Plan:
    """The answer: what one process holds, sends and takes in a step, and what that makes of the run."""

    settings: EngineSettings
    seq_len: int
    steps: int
    machines: Machines
    parameters: ParameterCount
    trained: int
    """Weights that are not frozen."""
    flops: FlopCount
    step: TracedStep
    time: StepTime | None
    """None where the device's rates are unknown."""
    compiled: StepTime | None
    """The same with `train.compile`; None where it is on, or the time unknown."""

    @property
    def layout(self):
        """The degrees of parallelism."""
        return next(iter(self.step.traces.values())).layout

    @property
    def tokens_per_device(self) -> int:
        """Tokens that one process computes in a step, on average over a context group."""
        return self.tokens_per_step // self.machines.devices

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        train = self.settings.train
        return train.micro_batch_size * train.gradient_accumulation * self.seq_len * self.layout.data_parallel

    @property
    def peak(self) -> float:
        """The most bytes that a process asks for at any instant of a step."""
        return max(sum(kinds.values()) for kinds in self.step.peaks().values())

    @property
    def needed(self) -> float:
        """The peak with the margin beside it, in bytes."""
        return self.peak + self.machines.margin.of(self.peak)

    @property
    def if_uneven(self) -> float:
        """The most bytes that come on top where the experts of a process get `UNEVEN` times their share of rows."""
        most = max(self.step.peaks().values(), key=lambda kinds: sum(kinds.values()))
        rows = sum(most.get(kind, 0) for kind in ("activations", "all-to-all buffers", "temporary"))
        return (UNEVEN - 1) * rows

    @property
    def fits(self) -> bool:
        """Whether the device has so much; true where it is not known."""
        return self.machines.limit is None or self.needed <= self.machines.limit

    @property
    def traffic(self) -> list[Traffic]:
        """The collectives of a step."""
        return self.step.traffic(self.machines.node_size)

    @property
    def model_flops_peak(self) -> Peak | None:
        """The rate that the utilisation is measured against."""
        gpu = self.machines.gpu
        if gpu is None:
            return None
        bf16 = self.settings.train.precision == "bf16"
        rate = gpu.bf16 if bf16 else gpu.fp32
        return Peak(rate, f"dense {'bf16' if bf16 else 'fp32'} peak of {gpu.name}", gpu.source.flops)

    @property
    def mfu(self) -> float | None:
        """The model FLOPs utilisation by `MFU_CONVENTION`."""
        if self.time is None or self.model_flops_peak is None:
            return None
        return self.time.mfu(self.flops, self.tokens_per_device, self.model_flops_peak)

    @property
    def hours(self) -> float | None:
        """Hours of the run, if steps were all."""
        return None if self.time is None else self.time.seconds * self.steps / 3600

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint of all processes: float32 weights, and two moments of those that are trained."""
        return 4 * self.parameters.total + 8 * self.trained

    @property
    def checkpoint_s(self) -> float:
        """Seconds until a checkpoint is on the disk, all machines writing; training goes on meanwhile."""
        return self.checkpoint_bytes / self.machines.nodes / self.machines.disk_bytes_per_s

    @property
    def data_bytes(self) -> int:
        """Bytes of the tokens of the whole run, each read once."""
        return token_dtype(self.settings.model.vocab_size).itemsize * self.tokens_per_step * self.steps


def make_plan(
    settings: EngineSettings,
    seq_len: int,
    steps: int,
    machines: Machines,
    objective: Objective,
    *,
    documents: bool = False,
    in_full: bool = False,
) -> Plan:
    """Trace a step of a run, and work out what it needs.

    Args:
        settings: What the engine reads of the configuration.
        seq_len: Tokens of a sample.
        steps: Optimizer steps of the run.
        machines: What it is planned for.
        objective: What the model is trained for.
        documents: Whether attention stays within documents.
        in_full: Trace every layer and micro-batch, instead of as few as tell the rest.

    Raises:
        ValueError: The settings do not fit each other or the number of devices.
    """
    compiled = settings.train.compile
    # What `auto` is depends on the machines, which the made-up world does not have.
    layout = plan_layout(settings.parallel, settings.model.num_local_experts, machines.devices, machines.node_size)
    parallel = dataclasses.replace(settings.parallel, expert_parallel=layout.expert_parallel)
    eager = dataclasses.replace(settings, train=dataclasses.replace(settings.train, compile=False), parallel=parallel)
    workload = Workload(
        seq_len,
        machines.devices,
        objective,
        machines.capability,
        documents=documents,
        memory_only=machines.capability is None and machines.hardware is None,
    )
    step = trace_model(eager, workload, in_full=in_full)
    return Plan(
        settings,
        seq_len,
        steps,
        machines,
        count_parameters(settings.model),
        count_trained(settings.model, settings.optim.freeze),
        flops_per_token(settings.model, seq_len),
        step,
        _time(step, machines, compiled),
        None if compiled or machines.capability is None else _time(step, machines, True),
    )


def _time(step: TracedStep, machines: Machines, compiled: bool) -> StepTime | None:
    hardware = machines.hardware or (DatasheetHardware(machines.gpu) if machines.gpu is not None else None)
    if hardware is None:
        return None
    times = {
        size: simulate(trace, hardware, machines.network, machines.node_size, compiled=compiled)
        for size, trace in step.traces.items()
    }
    by_count = {}
    for count in sorted({count for _, count in times}):
        depths = {layers: value for (layers, c), value in times.items() if c == count}
        by_count[count] = _extended(depths, step.size[0])
    return _extended(by_count, step.size[1])


def _extended(times: dict[int, StepTime], size: int) -> StepTime:
    few, many = min(times), max(times)
    return times[few] if few == many else extrapolate(times[few], times[many], (few, many), size)
