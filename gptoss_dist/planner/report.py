"""A plan as one screen of text, and as JSON."""

from __future__ import annotations

from typing import Any

from gptoss_dist.engine import engine_kind
from gptoss_dist.engine.zero_settings import zero_stage
from gptoss_dist.planner.flops import MFU_CONVENTION
from gptoss_dist.planner.plan import UNEVEN, Plan
from gptoss_dist.planner.tracing.memory import KINDS

GIB = 2**30


def engine_in_words(plan: Plan) -> str:
    """Return the engine, and what it shards."""
    if engine_kind(plan.settings.engine) == "deepspeed":
        return f"deepspeed ZeRO-{zero_stage(plan.settings.engine)}"
    return "fsdp" if plan.settings.parallel.reshard_after_forward else "fsdp, weights kept gathered"


def to_text(plan: Plan) -> str:
    """Return the plan as a screen of text."""
    return "\n".join([*_run(plan), *_memory(plan), *_traffic(plan), *_time(plan), *_disk(plan)])


def _run(plan: Plan) -> list[str]:
    train, degree = plan.settings.train, plan.layout.context_parallel
    sharers = "processes" if degree == 1 else f"groups of {degree} processes"
    return [
        f"machines     {plan.machines.name}",
        f"parameters   {plan.parameters.total:,} total, {plan.parameters.active:,} active per token",
        f"layout       {engine_in_words(plan)}, {plan.layout}, {train.precision}, "
        f"activation checkpointing {train.activation_checkpointing or 'off'}, "
        f"compile {'on' if train.compile else 'off'}",
        f"batch        {train.micro_batch_size} x {train.gradient_accumulation} accumulated x "
        f"{plan.layout.data_parallel} {sharers} x {plan.seq_len:,} tokens = {plan.tokens_per_step:,} tokens per step, "
        f"{plan.tokens_per_step * plan.steps:,} in {plan.steps:,} steps",
        f"compute      {plan.flops}",
    ]


def _memory(plan: Plan) -> list[str]:
    peaks = plan.step.peaks()
    lines = ["memory of a process, GiB" + "".join(f"{phase:>12}" for phase in peaks)]
    for kind in KINDS:
        values = [kinds.get(kind, 0) / GIB for kinds in peaks.values()]
        if max(values) >= 0.0005:
            lines.append(f"  {kind:<22}" + "".join(f"{value:12.3f}" for value in values))
    lines.append(
        f"  {'sum at the peak of each':<22}" + "".join(f"{sum(k.values()) / GIB:12.3f}" for k in peaks.values())
    )
    margin = plan.machines.margin.of(plan.peak)
    if (limit := plan.machines.limit) is None:
        return lines
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    beside = f" + {margin / GIB:.2f} for context and fragments" if margin else ""
    if plan.layout.expert_parallel > 1:
        uneven = plan.if_uneven / GIB
        lines.append(
            f"  routing is taken as even; {UNEVEN} times its share of rows would take a process up to {uneven:.1f} more"
        )
    lines.append(f"  {plan.peak / GIB:.2f}{beside} = {plan.needed / GIB:.2f} of {limit / GIB:.2f}: {verdict}")
    return lines


def _traffic(plan: Plan) -> list[str]:
    if plan.machines.devices == 1:
        return []
    lines = ["traffic of a process in a step"]
    for traffic in plan.traffic:
        where = f"{traffic.between / GIB:.3f} of it to other machines" if traffic.spans_nodes else "within a machine"
        lines.append(
            f"  {traffic.kind:<16}{traffic.sent / GIB:9.3f} GiB sent in {traffic.calls:6.0f} calls "
            f"of {traffic.ranks} processes, {where}"
        )
    return lines


def _time(plan: Plan) -> list[str]:
    time = plan.time
    if time is None:
        return ["time         unknown: calibrate this machine (launch/plan.py calibrate), or name a GPU"]
    parts = ", ".join(f"{kind} {seconds:.3f}" for kind, seconds in sorted(time.by_kind.items(), key=lambda kv: -kv[1]))
    rate = time.tokens_per_s(plan.tokens_per_device)
    lines = [
        f"time         {time.seconds:.3f} s per step: {100 * time.exposed_s / time.seconds:.0f} % waiting for other "
        f"processes, {100 * time.host_bound_share:.0f} % for the host",
        f"  seconds of {parts}",
        f"rate         {rate:,.0f} tokens/s per device, {rate * plan.machines.devices:,.0f} in all",
    ]
    if plan.mfu is not None:
        lines[-1] += f"; MFU {100 * plan.mfu:.1f} % of {plan.model_flops_peak} ({MFU_CONVENTION})"
    hours = plan.hours or 0.0
    lines.append(
        f"run          {hours:,.1f} hours, {hours * plan.machines.devices:,.0f} device hours, without validation, "
        "checkpoints and restarts"
    )
    if plan.compiled is not None:
        lines.append(f"  with --train.compile true {plan.compiled.seconds:.3f} s per step")
    if plan.machines.gpu is not None:
        lines.append("  times are a model's: of twelve published runs it was off by up to 30 % (docs/planning_time.md)")
    return lines


def _disk(plan: Plan) -> list[str]:
    return [
        f"disk         checkpoint {plan.checkpoint_bytes / GIB:,.1f} GiB, written in {plan.checkpoint_s:.0f} s at "
        f"{plan.machines.disk_bytes_per_s / 1e9:.1f} GB/s per machine; "
        f"tokens of the run {plan.data_bytes / GIB:,.1f} GiB"
    ]


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as a JSON object; sizes in bytes, times in seconds."""
    time = plan.time
    return {
        "machines": plan.machines.name,
        "devices": plan.machines.devices,
        "parameters": {"total": plan.parameters.total, "active": plan.parameters.active},
        "engine": engine_in_words(plan),
        "nodes": plan.machines.nodes,
        "gpu": None if plan.machines.gpu is None else plan.machines.gpu.name,
        "steps": plan.steps,
        "seq_len": plan.seq_len,
        "micro_batch_size": plan.settings.train.micro_batch_size,
        "gradient_accumulation": plan.settings.train.gradient_accumulation,
        "precision": plan.settings.train.precision,
        "activation_checkpointing": plan.settings.train.activation_checkpointing,
        "compile": plan.settings.train.compile,
        "layout": {
            "replicate": plan.layout.replicate,
            "shard": plan.layout.shard,
            "expert_parallel": plan.layout.expert_parallel,
            "context_parallel": plan.layout.context_parallel,
        },
        "tokens_per_step": plan.tokens_per_step,
        "memory": {
            "by_phase": plan.step.peaks(),
            "holds": plan.step.holds(),
            "peak": plan.peak,
            "needed": plan.needed,
            "limit": plan.machines.limit,
            "fits": plan.fits,
        },
        "traffic": [vars(traffic) for traffic in plan.traffic],
        "time": None
        if time is None
        else {
            "step_s": time.seconds,
            "by_kind_s": time.by_kind,
            "by_phase_s": time.by_phase,
            "exposed_s": time.exposed,
            "host_bound_s": time.host_bound,
            "tokens_per_s_per_device": time.tokens_per_s(plan.tokens_per_device),
            "mfu": plan.mfu,
            "hours": plan.hours,
            "device_hours": (plan.hours or 0.0) * plan.machines.devices,
            "step_s_compiled": None if plan.compiled is None else plan.compiled.seconds,
        },
        "checkpoint": {"bytes": plan.checkpoint_bytes, "seconds": plan.checkpoint_s},
        "data_bytes": plan.data_bytes,
    }
