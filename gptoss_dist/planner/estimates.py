"""Memory and time of thousands of layouts at once, roughly, so that a search traces the promising ones only.

Three traces of a single process, of one and two samples and with every block checkpointed, say what a token costs in
activations and in time. How weights are gathered, sharded and reduced is restated here in a few lines. That is good to
some ten percent, which decides what is traced, and what is not because it needs far too much.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from gptoss_dist.config import EngineConfig, ParallelConfig
from gptoss_dist.engine import EngineSettings, engine_kind
from gptoss_dist.engine.zero_settings import zero_stage
from gptoss_dist.parallel.mesh import DeviceLayout
from gptoss_dist.planner.plan import Machines, Plan
from gptoss_dist.planner.timing.prices import DatasheetHardware, collective_s
from gptoss_dist.planner.tracing.recorder import Operator

NEVER_HIDDEN = 0.3
"""Share of the communication that a step waits for although there is enough to compute: traced steps lie around it."""


_DEEPSPEED_S = {1: 1.25, 2: 1.35, 3: 1.08}
"""Traced seconds over estimated ones by stage of ZeRO, of gpt-oss-20b on 64 H100: what DeepSpeed copies and reduces."""
_DEEPSPEED_BYTES = {1: 0.0, 2: 8.0, 3: 0.0}
"""The same of memory, in bytes per parameter that a process computes with."""


@dataclass(frozen=True)
class _Unit:
    """What one process needs for a micro-batch, nothing being sharded."""

    activations_per_layer: float
    """Bytes for one sample."""
    activations_beside: float
    """Bytes for one sample, of no layer."""
    head: float
    """Bytes, whatever the batch."""
    seconds: float
    """For one sample, beside `fixed_s`."""
    fixed_s: float
    """Seconds for any number of samples: weights are read, and their gradients written."""


UNITS = ((0, 1), (0, 2), (1, 2))
"""Checkpointing and samples of the single-process steps that estimates rest on."""


def unit_settings(settings: EngineSettings) -> list[EngineSettings]:
    """Return the settings of `UNITS`, to be planned on one device."""
    engine = EngineConfig(kind="fsdp")
    parallel = ParallelConfig(experts=settings.parallel.experts)
    found = []
    for every, samples in UNITS:
        train = dataclasses.replace(
            settings.train, micro_batch_size=samples, gradient_accumulation=1, activation_checkpointing=every
        )
        found.append(dataclasses.replace(settings, train=train, parallel=parallel, engine=engine))
    return found


class Estimator:
    """Rough memory and time of any layout of one model on given machines.

    Args:
        machines: What is planned for, GPUs.
        units: Plans of `unit_settings` on one such device.
    """

    def __init__(self, machines: Machines, units: list[Plan]) -> None:
        one, two, recomputed = units
        self.machines, self.model, self.seq_len = machines, one.settings.model, one.seq_len
        self.count, self.layers = one.parameters, self.model.num_hidden_layers
        slope = _seconds(two) - _seconds(one)
        fixed = max(0.0, _seconds(one) - slope)
        self.units = {
            0: _unit(one, 1, slope, fixed),
            1: _unit(recomputed, 2, (_seconds(recomputed) - fixed) / 2, fixed),
        }

    def memory(self, settings: EngineSettings, layout: DeviceLayout) -> float:
        """Return the peak of a process in bytes, margin excluded."""
        train, count = settings.train, self.count
        compute = 2 if train.precision == "bf16" else 4
        whole, tables, block = self._sizes(layout)
        passing = 2 * block + tables
        share = count.total / layout.shard
        if _is_deepspeed(settings):
            stage = zero_stage(settings.engine)
            gathered = compute * (whole if stage < 3 else share + passing)
            gradients = 4 * (share if stage > 1 else whole) + (compute * whole if stage == 1 else 0)
            while_forward = gradients if stage == 1 or train.gradient_accumulation > 1 else 0.0
        else:
            keeps = not settings.parallel.reshard_after_forward or layout.world_size == 1
            gathered = compute * (whole if keeps else passing)
            gradients = 4 * (share if train.gradient_accumulation == 1 else whole)
            while_forward = gradients if train.gradient_accumulation > 1 else 0.0
        every, samples = train.activation_checkpointing, train.micro_batch_size
        kept = self.layers - (self.layers // every if every else 0)
        whole_block = self.units[0].activations_per_layer
        activations = kept * whole_block + (self.layers - kept) * self.units[1].activations_per_layer
        activations = samples * (activations + self.units[0].activations_beside + (whole_block if every else 0))
        forward = gathered + activations + self.units[0].head + while_forward
        backward = gathered + gradients + 4 * (2 * tables + 2 * block)
        beside = _DEEPSPEED_BYTES[zero_stage(settings.engine)] * whole if _is_deepspeed(settings) else 0.0
        return 12 * share + max(forward, backward) + beside

    def seconds(self, settings: EngineSettings, layout: DeviceLayout) -> float:
        """Return the seconds of a step."""
        train = settings.train
        every, micro_batches = train.activation_checkpointing, train.gradient_accumulation
        recomputed = (self.layers // every) / self.layers if every else 0.0
        sample = self.units[0].seconds + recomputed * (self.units[1].seconds - self.units[0].seconds)
        whole, _, _ = self._sizes(layout)
        fixed = self.units[0].fixed_s * whole / self.count.total
        compute = (sample * train.micro_batch_size + fixed) * micro_batches
        gathers, reductions = self._passes(settings)
        width = 2 if train.precision == "bf16" else 4
        weights = gathers * self._over_shards("_allgather_base_", width, layout)
        gradients = reductions * self._over_shards("_reduce_scatter_base_", 4, layout)
        if layout.replicate > 1:
            group = tuple(range(0, layout.world_size, layout.shard))
            gradients += self._collective("allreduce_", 2 * 4 * whole / layout.shard, group)
        # Gathers and reductions hide behind computation, as far as there is any, and never quite; rows do not.
        communication = weights + gradients
        exposed = max(NEVER_HIDDEN * communication, communication - compute)
        total = compute + exposed + self._rows_s(settings, layout)
        return total * (_DEEPSPEED_S[zero_stage(settings.engine)] if _is_deepspeed(settings) else 1.0)

    def _over_shards(self, name: str, width: int, layout: DeviceLayout) -> float:
        """Return the seconds of one collective of all weights: each expert's among the few processes that share it."""
        dense, ep = self.count.total - self.count.experts, layout.expert_parallel
        among_all = self._collective(name, width * dense, tuple(range(layout.shard)))
        return among_all + self._collective(name, width * self.count.experts / ep, tuple(range(0, layout.shard, ep)))

    def _passes(self, settings: EngineSettings) -> tuple[int, int]:
        """Return how often a step gathers all weights and reduces all gradients."""
        micro_batches = settings.train.gradient_accumulation
        if _is_deepspeed(settings):
            stage = zero_stage(settings.engine)
            return (2 * micro_batches if stage == 3 else 1), (1 if stage == 1 else micro_batches)
        return (2 if settings.parallel.reshard_after_forward else 1) * micro_batches, 1

    def _sizes(self, layout: DeviceLayout) -> tuple[float, float, float]:
        """Return the parameters of a process once all is gathered, of the embedding and head, and of a block."""
        whole = self.count.total - self.count.experts + self.count.experts / layout.expert_parallel
        tables = (1 if self.model.tie_word_embeddings else 2) * self.model.vocab_size * self.model.hidden_size
        return whole, tables, (whole - tables) / self.layers

    def _rows_s(self, settings: EngineSettings, layout: DeviceLayout) -> float:
        ep, train, model = layout.expert_parallel, settings.train, self.model
        if ep == 1:
            return 0.0
        tokens = train.micro_batch_size * self.seq_len
        width = 2 if train.precision == "bf16" else 4
        rows = tokens * model.num_experts_per_tok * model.hidden_size * width
        # Out and back, forward and backward; checkpointing repeats the forward ones.
        every = train.activation_checkpointing
        times = 4 + (2 / every if every and not train.keep_all_to_all else 0)
        once = self._collective("alltoall_base_", rows, tuple(range(ep)))
        return times * self.layers * train.gradient_accumulation * once

    def _collective(self, name: str, nbytes: float, group: tuple[int, ...]) -> float:
        n = len(group)
        if n == 1:
            return 0.0
        operator = Operator(f"c10d.{name}.default", "forward", 0, 0, 0, None, (), (), (), group, nbytes * (n - 1) / n)
        machines = self.machines
        assert machines.gpu is not None
        hardware = machines.hardware or DatasheetHardware(machines.gpu)
        return collective_s(operator, hardware, machines.network, machines.node_size)


def _is_deepspeed(settings: EngineSettings) -> bool:
    return engine_kind(settings.engine) == "deepspeed"


def _seconds(plan: Plan) -> float:
    """Return the seconds of the passes of a step, without its update."""
    assert plan.time is not None, "a search needs to know the device's rates"
    return plan.time.seconds - plan.time.by_phase.get("update", 0.0)


def _unit(plan: Plan, samples: int, seconds: float, fixed_s: float) -> _Unit:
    timelines = plan.step.timelines
    few, many = min(timelines), max(timelines)
    low, high = (timelines[size].peaks()["forward"] for size in (few, many))
    slope = (high["activations"] - low["activations"]) / max(many[0] - few[0], 1)
    beside = low["activations"] - few[0] * slope
    return _Unit(slope / samples, beside / samples, low["head"], seconds, fixed_s)
