"""The settings that DeepSpeed is started with: ours in its words, and the user's further ones.

Every top-level key of DeepSpeed is one of three: it is set here from our own settings, handed on, or refused by name,
because it would change what is computed without the training loop's knowledge. Any other key is a typing error.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

import msgspec
import psutil
import torch
import torch.distributed as dist

from data_pipeline.foreign import Count, convert
from data_pipeline.printable import shortened
from gptoss_dist.config import EngineConfig, ParallelConfig
from gptoss_dist.engine.base import EngineSettings
from gptoss_dist.parallel.mesh import DeviceLayout, ranks_per_node

DEFAULT_STAGE = 2
# DeepSpeed's 5e8 are a buffer of 2 GB in ZeRO-3, however small the model; buckets of this size are large enough to fill
# a network.
BUCKET_ELEMENTS = 2**25

# These are handed on: communication, logging, profiling, NVMe. None changes what is computed (see also `_ONLY`).
_PASSED = {
    "zero_optimization",
    "data_types",
    "bf16",
    "aio",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "steps_per_print",
    "log_level",
    "tensorboard",
    "csv_monitor",
    "comet",
    "wandb",
    "disable_python_gc",
    "disable_allgather",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}
# These are refused, with the setting to use instead or the reason.
_REFUSED = {
    "optimizer": "set optim.*",
    "scheduler": "set optim.schedule, optim.warmup_steps, optim.decay_steps",
    "activation_checkpointing": "set train.activation_checkpointing",
    "fp16": "set train.precision: bf16",
    "amp": "set train.precision: bf16",
    "torch_autocast": "set train.precision: bf16",
    "gradient_allreduce_op": "gradients are summed",
    "gradient_predivide_factor": "gradients are summed",
    "prescale_gradients": "gradients are summed",
    "managed_gradient_accumulation": "set train.gradient_accumulation",
    "expert_parallel": "set parallel.expert_parallel",
    "use_data_before_expert_parallelism": "experts of a group are on neighbouring ranks",
    "tensor_parallel": "there is no tensor parallelism",
    "pipeline": "there is no pipeline parallelism",
    "checkpoint": "set checkpoint.*; checkpoints are the same under both engines",
    "elasticity": "any checkpoint resumes on any number of processes",
    "compile": "set train.compile",
    "sparse_gradients": "no gradient is sparse",
}
# What of the refused ones asks for nothing, besides sections that are not enabled.
_NEUTRAL = {"gradient_predivide_factor": 1}
# Nothing else of these sections is handed on: the rest would round master weights or buffers.
_ONLY = {"bf16": {"enabled", "check_grad_overflow", "immediate_grad_update"}, "data_types": {"grad_accum_dtype"}}
_REFUSED_ZERO = {
    "round_robin_gradients": "DeepSpeed 0.19 then loses track of which weights are where",
    "mics_shard_size": "use engine.kind=fsdp with parallel.replicate",
    "mics_hierarchical_params_gather": "use engine.kind=fsdp with parallel.replicate",
    "zenflow": "its updates are late, which the training loop does not expect",
}

_Size = Annotated[float, msgspec.Meta(ge=0)]
"""A number of bytes or values, which DeepSpeed's own examples write as 5e8."""


class _Offload(msgspec.Struct):
    """The sections `offload_optimizer` and `offload_param`, as far as their types are known here."""

    device: Literal["none", "cpu", "nvme"] | None = None
    nvme_path: str | None = None
    pin_memory: bool = False
    fast_init: bool = False
    pipeline: bool = False
    pipeline_read: bool = False
    pipeline_write: bool = False
    super_offload: bool = False
    buffer_count: Count = 0
    buffer_size: _Size = 0
    max_in_cpu: _Size = 0
    ratio: _Size = 1


class _Zero(msgspec.Struct):
    """The section `zero_optimization`, as far as its types are known here."""

    offload_optimizer: _Offload | None = None
    offload_param: _Offload | None = None
    overlap_comm: bool | None = None
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    allgather_partitions: bool = True
    zero_quantized_weights: bool = False
    zero_quantized_gradients: bool = False
    zero_quantized_nontrainable_weights: bool = False
    zero_hpz_partition_size: Count = 1
    reduce_bucket_size: _Size | None = None
    allgather_bucket_size: _Size | None = None
    sub_group_size: _Size | None = None
    stage3_max_live_parameters: _Size | None = None
    stage3_max_reuse_distance: _Size | None = None
    stage3_prefetch_bucket_size: _Size | None = None
    stage3_param_persistence_threshold: _Size | None = None


class _Aio(msgspec.Struct):
    """The section `aio`."""

    block_size: Count = 0
    queue_depth: Count = 0
    thread_count: Count = 0
    intra_op_parallelism: Count = 0
    single_submit: bool = False
    overlap_events: bool = False
    use_gds: bool = False


class _Sections(msgspec.Struct):
    """What is handed on, as far as its types are known here."""

    zero_optimization: _Zero
    aio: _Aio | None = None
    comms_logger: dict[str, Any] | None = None
    flops_profiler: dict[str, Any] | None = None
    tensorboard: dict[str, Any] | None = None
    csv_monitor: dict[str, Any] | None = None
    comet: dict[str, Any] | None = None
    wandb: dict[str, Any] | None = None
    steps_per_print: Count | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False


def zero_stage(engine: EngineConfig) -> int:
    """Return the ZeRO stage of a run.

    Raises:
        ValueError: There is no such stage here.
    """
    named = _section(_given(engine), "zero_optimization").get("stage", "auto")
    key, stage = "engine.zero_stage", engine.zero_stage
    if stage is None:
        key, stage = "engine.deepspeed: zero_optimization.stage", DEFAULT_STAGE if named == "auto" else named
    if type(stage) is not int or stage not in (1, 2, 3):
        reason = " (0 shards nothing, and DeepSpeed clips distributed experts wrongly with it)" if stage == 0 else ""
        raise ValueError(f"{key}={stage!r} is not possible; choose 1, 2 or 3{reason}")
    return stage


def _given(engine: EngineConfig) -> dict[str, Any]:
    """Return the contents of `engine.deepspeed`, which `Config` has put in the place of a file's name."""
    assert not isinstance(engine.deepspeed, str), engine.deepspeed
    return engine.deepspeed or {}


def _section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the settings under `name`, empty if there are none.

    Raises:
        ValueError: They are not an object.
    """
    section = settings.get(name, {})
    if not isinstance(section, dict):
        raise ValueError(f"engine.deepspeed: {name}={section!r} must be an object")
    return section


def check_layout(parallel: ParallelConfig) -> None:
    """Refuse what this engine cannot do and the other can.

    Raises:
        ValueError: One line that names the setting and what to choose instead.
    """
    if (replicate := parallel.replicate) > 1:
        raise ValueError(
            f"parallel.replicate={replicate} is not possible with engine.kind=deepspeed; choose --engine.kind fsdp, or "
            "zero_optimization.zero_hpz_partition_size in engine.deepspeed"
        )
    if not parallel.reshard_after_forward:
        raise ValueError(
            "parallel.reshard_after_forward=false is not possible with engine.kind=deepspeed; choose engine.zero_stage "
            "1 or 2, which keep weights whole"
        )


def deepspeed_settings(settings: EngineSettings, layout: DeviceLayout) -> dict[str, Any]:
    """Return the whole configuration for `deepspeed.initialize`.

    Raises:
        ValueError: engine.deepspeed contradicts another setting, or holds a key that has no place; one line that names
            the key, its value and the setting to use.
    """
    given = copy.deepcopy(_given(settings.engine))
    problems = _take_out_replaced_keys(given)
    ours = _our_settings(settings, layout)
    for key, (value, origin) in ours.items():
        problems += _fill_in(given, key, value, origin)
    problems += _other_keys(given, ours)
    if problems:  # together: a file that was made for another program has many
        raise ValueError(f"engine.deepspeed: {'; '.join(problems)}")
    given = _without_gaps(given)
    remedy = "give it as DeepSpeed's documentation says, or leave it out"
    convert(given, _Sections, "engine.deepspeed", finite=True, remedy=remedy)
    zero = given["zero_optimization"]
    _check_distributed_experts(zero, layout)
    zero.setdefault("reduce_bucket_size", BUCKET_ELEMENTS)
    # torch's fused AdamW steps on the host too; DeepSpeed's own would have to be compiled first.
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    } | given


def _take_out_replaced_keys(given: dict[str, Any]) -> list[str]:
    """Remove the user's keys whose place another setting of this project has taken.

    Returns:
        A phrase for each that asks for something.
    """
    problems = []
    for key in [key for key in given if key in _REFUSED]:
        value = given.pop(key)
        if not _asks_for_nothing(key, value):
            problems.append(f"{key}={shortened(repr(value))} has no place here: {_REFUSED[key]}")
    for key, value in _section(given, "zero_optimization").items():
        if key in _REFUSED_ZERO and value and value != "auto":
            problems.append(f"zero_optimization.{key}={shortened(repr(value))} has no place here: {_REFUSED_ZERO[key]}")
    return problems


def _asks_for_nothing(key: str, value: Any) -> bool:
    """Return whether the value leaves what `key` is about as it is, or to the program that starts DeepSpeed."""
    if isinstance(value, dict):
        return not value or value.get("enabled", True) in (False, "auto")
    return value in (None, False, "auto") or value == _NEUTRAL.get(key)


def _without_gaps(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without those that are still "auto", which DeepSpeed itself would not understand."""
    return {
        key: _without_gaps(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != "auto"
    }


def _our_settings(settings: EngineSettings, layout: DeviceLayout) -> dict[str, tuple[Any, str]]:
    """Return the settings that follow from the rest of the configuration.

    Returns:
        {dotted key of DeepSpeed: (value, the setting or the reason that it comes from)}.
    """
    train = settings.train
    return {
        "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (train.gradient_accumulation, "train.gradient_accumulation"),
        "train_batch_size": (
            train.micro_batch_size * train.gradient_accumulation * layout.world_size,
            f"train.micro_batch_size x train.gradient_accumulation x {layout.world_size} processes"
            + " (DeepSpeed counts a sequence once for each process that shares it)" * (layout.context_parallel > 1),
        ),
        "gradient_clipping": (settings.optim.clip_norm, "optim.clip_norm"),
        "zero_optimization.stage": (zero_stage(settings.engine), "engine.zero_stage"),
        "bf16.enabled": (train.precision == "bf16", "train.precision"),
        # Gradients are added up and reduced in float32, whatever the model computes in.
        "communication_data_type": ("fp32", "float32 reduction"),
        "data_types.grad_accum_dtype": ("fp32", "float32 accumulation"),
        # Clipping and the skipping of non-finite steps are read from them.
        "bf16.check_grad_overflow": (True, "non-finite steps are skipped"),
        "zero_optimization.compute_grad_norm": (True, "the gradient norm is reported"),
    }


def _fill_in(settings: dict[str, Any], key: str, value: Any, origin: str) -> list[str]:
    """Set the dotted `key` to `value`, unless the user gave it another value.

    Returns:
        A phrase about the user's value, if that is another one.
    """
    *path, name = key.split(".")
    section = settings
    for part in path:
        section = section.setdefault(part, _section(section, part))
    found = section.get(name, "auto")  # the word that Hugging Face's configurations leave gaps with
    if found != "auto" and found != value:
        return [f"{key}={shortened(repr(found))} contradicts {origin}, which gives {value!r}; leave {key} out"]
    section[name] = value
    return []


def _other_keys(settings: dict[str, Any], ours: dict[str, tuple[Any, str]]) -> list[str]:
    """Return a phrase for each key that DeepSpeed does not have, and of a section of which only a few are handed on."""
    known = _PASSED | {key.split(".")[0] for key in ours}
    problems = [
        f"{key}={shortened(repr(value))} is not a setting of DeepSpeed that is known here"
        for key, value in settings.items()
        if key not in known
    ]
    for part, allowed in _ONLY.items():
        problems += [
            f"{part}.{key}={shortened(repr(settings[part][key]))} has no place here: master weights, optimizer state "
            "and buffers stay float32"
            for key in sorted(settings[part].keys() - allowed)
            if settings[part][key] != "auto"
        ]
    return problems


def _check_distributed_experts(zero: dict[str, Any], layout: DeviceLayout) -> None:
    """Refuse what DeepSpeed 0.19 cannot combine with experts that are distributed over ranks."""
    if layout.expert_parallel == 1 or zero["stage"] < 3:
        return
    for key, off in (("zero_quantized_gradients", False), ("zero_hpz_partition_size", 1)):
        if zero.get(key, off) != off:
            raise ValueError(
                f"engine.deepspeed: zero_optimization.{key}={zero[key]!r} is not possible with "
                f"parallel.expert_parallel={layout.expert_parallel}; set it to 1, or leave {key} out"
            )


def check_frozen(settings: dict[str, Any], patterns: list[str]) -> None:
    """Refuse frozen parameters where their values cannot be written.

    Args:
        settings: Those of `deepspeed_settings`.
        patterns: `optim.freeze`.

    Raises:
        ValueError: One line that names both settings.
    """
    zero = settings["zero_optimization"]
    for key, refused in (
        ("offload_param.device=nvme", (zero.get("offload_param") or {}).get("device") == "nvme"),
        ("zero_quantized_nontrainable_weights", bool(zero.get("zero_quantized_nontrainable_weights"))),
    ):
        if patterns and refused:
            raise ValueError(f"optim.freeze={patterns} is not possible with engine.deepspeed's {key}; leave one out")


def check_offload(settings: dict[str, Any], parameters: int, layout: DeviceLayout) -> None:
    """Check that the host's memory can take what is offloaded to it; collective where there is a process group.

    Args:
        settings: Those of `deepspeed_settings`.
        parameters: The number of weights of the whole model.

    Raises:
        ValueError: One line, on every rank: the machine of one cannot take it, or the stage has nothing to offload.
    """
    bytes_per_weight = _offloaded_bytes(settings)
    if bytes_per_weight == 0:
        return
    processes = min(ranks_per_node(layout.world_size), layout.world_size)
    needed = bytes_per_weight * parameters * processes / layout.world_size
    available = torch.tensor(psutil.virtual_memory().available)
    if dist.is_initialized():  # one answer for all, though machines differ and memory is being taken meanwhile
        dist.all_reduce(available, op=dist.ReduceOp.MIN)
    if needed > available:
        raise ValueError(
            f"engine.deepspeed: offloading to the host needs {needed / 2**30:.1f} GiB on each machine "
            f"({bytes_per_weight} bytes for each of {parameters:,} weights, {processes} of {layout.world_size} shares) "
            f"but {available / 2**30:.1f} GiB are free; use more machines, or do not offload"
        )


def _offloaded_bytes(settings: dict[str, Any]) -> int:
    """Return how many bytes of the host's memory each weight takes, over all ranks together.

    Raises:
        ValueError: What engine.deepspeed wants to offload cannot be; one line.
    """
    zero, bytes_per_weight = settings["zero_optimization"], 0
    compute = 2 if settings["bf16"]["enabled"] else 4
    for key, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        section = zero.get(key) or {}
        device = section.get("device") or "none"
        if device == "none":
            continue
        if zero["stage"] not in stages:
            raise ValueError(
                f"engine.deepspeed: zero_optimization.{key} is not possible with engine.zero_stage={zero['stage']}; "
                f"choose {' or '.join(map(str, stages))}"
            )
        if key == "offload_param":
            # To NVMe, DeepSpeed keeps the first 1e9 weights of a rank (max_in_cpu) on the host all the same.
            bytes_per_weight += compute if device == "cpu" else 0
            continue
        if device == "nvme":
            raise ValueError(
                "engine.deepspeed: zero_optimization.offload_optimizer.device=nvme is not possible: checkpoints cannot "
                "be written from there; choose cpu (offload_param may go to nvme)"
            )
        for name, off in (("ratio", 1.0), ("super_offload", False)):
            if section.get(name, off) != off:
                raise ValueError(
                    f"engine.deepspeed: zero_optimization.offload_optimizer.{name}={section[name]!r} is not possible: "
                    f"it needs DeepSpeed's own optimizer, here it is torch's; leave {name} out"
                )
        # Master weights, two moments and the gradient in float32; in stages 1 and 2 a buffer of the weights, and in
        # float32 one that gradients are accumulated in.
        bytes_per_weight += 16
        if zero["stage"] < 3:
            bytes_per_weight += compute + (4 if compute == 4 and settings["gradient_accumulation_steps"] > 1 else 0)
    return bytes_per_weight
