"""What a run will cost, from its settings alone: `launch/train.py --dry-run`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from gptoss_dist.config import Config, EvaluationConfig, TrainConfig
from gptoss_dist.engine import engine_kind
from gptoss_dist.engine.zero_settings import check_layout
from gptoss_dist.evaluation.harness.in_training import check_chat, check_tasks
from gptoss_dist.parallel.mesh import plan_layout, ranks_per_node
from gptoss_dist.planner.hardware import find_network, gpu_of_driver
from gptoss_dist.planner.plan import Machines, Plan, make_plan
from gptoss_dist.planner.report import GIB, to_text
from gptoss_dist.tracking.delivery.bridges import check_bridges
from gptoss_dist.train.data import UnreadableSources, open_training_data, open_validation
from gptoss_dist.train.objectives import next_token_prediction
from gptoss_dist.train.start import engine_settings


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
        if config.resume is None and not config.init["from"]:  # other weights may bring a template with them
            check_chat(config.evaluation, mixture.tokenizer, {})
    except UnreadableSources as error:
        lines += [f"NOT READY: {reason}" for reason in error.reasons]
    except ValueError as error:
        lines.append(f"NOT READY: {error}")
    return lines


def describe(config: Config, world_size: int | None = None) -> tuple[str, str | None]:
    """Return the text of a dry run: parameters, tokens, FLOPs, memory and layout; and why the run cannot fit, if so.

    Args:
        config: The run.
        world_size: Processes; None takes the launcher's.

    Raises:
        ValueError: The processes cannot be laid out as `parallel` says, the engine refuses its settings, or tasks to
            evaluate are not known.
    """
    world_size = world_size or int(os.environ.get("WORLD_SIZE", 1))
    check_tasks(config.evaluation)
    check_bridges(config.tracking.also)
    layout = plan_layout(config.parallel, config.model.num_local_experts, world_size)
    if engine_kind(config.engine) == "deepspeed":
        check_layout(config.parallel)
    plan = _plan(config, machines_here(world_size))
    samples = config.train.micro_batch_size * config.train.gradient_accumulation * layout.data_parallel
    lines = [
        f"run          {config.run.name} in {config.folder}",
        *(f"data         {line}" for line in _describe_data(config, samples)),
        *_describe_tasks(config.evaluation),
        to_text(plan),
    ]
    return "\n".join(lines), None if plan.fits else _refusal(config, plan)


def _describe_tasks(config: EvaluationConfig) -> list[str]:
    if not config.every:
        return []
    most = f"{config.limit:,} documents each" if config.limit else "all documents"
    names = ", ".join(config.tasks)
    return [f"evaluation   {names} every {config.every:,} steps, {most}, at most {config.max_seconds:g} s each time"]


def machines_here(world_size: int) -> Machines:
    """Return this machine, as one of those that have `world_size` devices between them."""
    node_size = min(ranks_per_node(world_size), world_size)
    if world_size % node_size:
        raise ValueError(f"WORLD_SIZE={world_size} is no multiple of LOCAL_WORLD_SIZE={node_size}")
    if not torch.cuda.is_available():
        return Machines(world_size, node_size, memory_bytes=psutil.virtual_memory().total / node_size)
    gpu, memory = gpu_of_driver(torch.cuda.get_device_name()), torch.cuda.get_device_properties(0).total_memory
    # Between machines the network is not known here: the fastest of the table, which flatters.
    network = find_network("ib-400") if world_size > node_size else None
    capability = torch.cuda.get_device_capability()
    return Machines(world_size, node_size, gpu, network, memory_bytes=memory, cuda=capability)


def _plan(config: Config, machines: Machines) -> Plan:
    return make_plan(
        engine_settings(config),
        config.data.seq_len,
        config.train.steps,
        machines,
        next_token_prediction,
        documents=config.data.masks_documents,
    )


def _refusal(config: Config, plan: Plan) -> str:
    """Return one line: which settings need too much, and what would fit."""
    limit, train = plan.machines.limit or 0.0, config.train
    asked = f"train.micro_batch_size={train.micro_batch_size} with train.activation_checkpointing="
    problem = (
        f"{asked}{train.activation_checkpointing} needs {plan.needed / GIB:.1f} GiB of each process, and there are "
        f"{limit / GIB:.1f}"
    )
    per_sample = 0.0
    for change in _smaller(train):
        size = change.get("micro_batch_size", train.micro_batch_size)
        if size * per_sample > limit:  # memory shrinks by less than the micro-batch
            continue
        other = _plan(dataclasses.replace(config, train=dataclasses.replace(train, **change)), plan.machines)
        per_sample = other.needed / size
        if other.fits:
            words = " ".join(f"--train.{name} {value}" for name, value in change.items())
            return f"{problem}; {words} would fit ({other.needed / GIB:.1f} GiB)"
    return (
        f"{problem}; no micro-batch fits, with checkpointing neither: take more processes or other devices "
        "(launch/plan.py --search finds a layout)"
    )


def _smaller(train: TrainConfig) -> Iterator[dict[str, Any]]:
    """Return changes for the same global batch, those that cost less time first."""
    if train.activation_checkpointing != 1:
        yield {"activation_checkpointing": 1}
    for size in range(train.micro_batch_size // 2, 0, -1):
        if train.micro_batch_size % size == 0:
            accumulation = train.gradient_accumulation * train.micro_batch_size // size
            yield {"micro_batch_size": size, "gradient_accumulation": accumulation, "activation_checkpointing": 1}
