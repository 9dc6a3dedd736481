"""What a run will cost, from its settings alone: `launch/train.py --dry-run`."""

from __future__ import annotations

import os

from gptoss_dist.config import Config
from gptoss_dist.engine import engine_kind
from gptoss_dist.engine.zero_settings import check_layout, deepspeed_settings
from gptoss_dist.parallel.mesh import plan_layout
from gptoss_dist.planner.flops import flops_per_token
from gptoss_dist.planner.parameters import count_parameters, memory_estimate
from gptoss_dist.train.data import open_training_data, open_validation
from gptoss_dist.train.start import engine_settings

GIB = 2**30


def _describe_data(config: Config, samples_per_step: int) -> list[str]:
    """Return lines about the data that are there, or why a run would be refused."""
    lines = []
    try:
        mixture = open_training_data(config, samples_per_step).mixture
        end = config.train.steps * samples_per_step
        usage = mixture.usage(end)
        for source, used in zip(mixture.sources, usage):
            data = source.dataset
            packed = [f"{data.samples_per_epoch:,} samples ({data.packing})"]
            for name in ("padding", "cut"):
                if (share := getattr(data, f"{name}_share", None)) is not None:
                    packed.append(f"{share:.2%} {'padding' if name == 'padding' else 'of documents cut'}")
            whose = f"{source.name}: " if len(usage) > 1 else ""
            share = f"{used.share:.2%} of this run's tokens, " if len(usage) > 1 else ""
            lines.append(
                f"train: {whose}{data.tokens_total:,} tokens in {data.documents_total:,} documents, "
                f"{', '.join(packed)}, {share}{used.epochs:.2f} epochs"
            )
        if len(usage) > 1:
            lines.append(f"from step 1: {mixture.shares(0)} of the tokens")
        changes = [(position, what) for position, what in mixture.changes if position < end]
        lines += [f"from step {position // samples_per_step + 1}: {what}" for position, what in changes]
        if config.validation.every:
            for name, split in open_validation(config, lines.append).items():
                whose = f"{name}: " if len(usage) > 1 else ""
                lines.append(f"validation: {whose}{split.tokens_total:,} tokens in {split.documents_total:,} documents")
    except ValueError as error:
        lines.append(f"NOT READY: {error}")
    return lines


def describe(config: Config, world_size: int | None = None) -> str:
    """Return the text of a dry run: parameters, tokens, FLOPs, memory and layout.

    Raises:
        ValueError: The processes cannot be laid out as `parallel` says, or the engine refuses its settings.
    """
    world_size = world_size or int(os.environ.get("WORLD_SIZE", 1))
    layout = plan_layout(config.parallel, config.model.num_local_experts, world_size)
    engine = "fsdp"
    if engine_kind(config.engine) == "deepspeed":
        check_layout(config.parallel)
        engine = f"deepspeed ZeRO-{deepspeed_settings(engine_settings(config), layout)['zero_optimization']['stage']}"
    train, count, flops = (
        config.train,
        count_parameters(config.model),
        flops_per_token(config.model, config.data.seq_len),
    )
    batch = train.micro_batch_size * train.gradient_accumulation * world_size
    tokens = batch * config.data.seq_len
    memory = memory_estimate(engine_settings(config), config.data.seq_len, layout)
    lines = [
        f"run          {config.run.name} in {config.folder}",
        f"parameters   {count.total:,} total, {count.active:,} active per token",
        f"batch        {batch:,} samples x {config.data.seq_len:,} tokens = {tokens:,} tokens per step "
        f"({train.micro_batch_size} x {train.gradient_accumulation} accumulated x {world_size} processes)",
        f"tokens       {tokens * train.steps:,} in {train.steps:,} steps",
        *(f"data         {line}" for line in _describe_data(config, batch)),
        f"compute      {flops}, {flops.training * tokens * train.steps:.3e} FLOP in all",
        f"layout       {engine}, {layout}, dispatch {config.parallel.experts}, {train.precision}, "
        f"activation checkpointing {train.activation_checkpointing or 'off'}, "
        f"compile {'on' if train.compile else 'off'}",
        "memory per process, estimated:",
        *(f"  {name:<28}{size / GIB:9.2f} GiB" for name, size in memory.items()),
        f"  {'sum':<28}{sum(memory.values()) / GIB:9.2f} GiB",
    ]
    return "\n".join(lines)
