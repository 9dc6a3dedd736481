"""Training engine on DeepSpeed ZeRO (Rajbhandari et al., arXiv:1910.02054), stages 1 to 3, with distributed experts.

DeepSpeed owns flat float32 master weights, the reduction of gradients, clipping and the step. What it takes to make
that the same training as under FSDP2:

- Gradients are averaged over ranks there and summed here, so the loss is multiplied by the number of ranks.
- Experts that are distributed over ranks are made known to it by attributes of their parameters, and by the class
  `_DistributedExperts`.
- Initial weights and checkpoints go straight into the runs of elements that this rank holds (`flat_shard.py`).

This reaches into DeepSpeed 0.19: other versions are refused.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.engine.base import Engine, EngineSettings, Objective
from gptoss_dist.engine.flat_shard import boxes, flat_shard
from gptoss_dist.engine.optimizer import adamw, allocate_state, freeze, parameter_groups, set_learning_rate
from gptoss_dist.engine.zero_settings import check_frozen, check_layout, check_offload, deepspeed_settings, zero_stage
from gptoss_dist.model.init import fill
from gptoss_dist.model.transformer import GptOss
from gptoss_dist.ops.precision import DTYPES
from gptoss_dist.parallel.context import split_sequences
from gptoss_dist.parallel.mesh import build_meshes, local, plan_layout
from gptoss_dist.parallel.parallelize import place_experts, wrap_blocks

SUPPORTED = "0.19."
# Where DeepSpeed's optimizers keep tensors from step to step, besides parameters and float32 master weights: flat
# weights and what they are copied through, and gradients that are summed up, reduced or on their way to the host.
_WEIGHTS = ("bf16_groups_flat", "bit16_groups_flat", "lp_param_buffer", "param_buffer_of_bit16_for_cpu_offload_groups")
_GRADIENTS = (
    "fp32_groups_gradients_flat",
    "averaged_gradients",
    "all_grad_tensors",
    "grad_partitions_flat_buffer",
    "accumulated_grads_in_cpu",
    "temp_grad_buffer_for_cpu_offload",
    "temp_grad_buffer_for_gpu_offload",
)


def load_deepspeed(ranks: Ranks):
    """Import DeepSpeed and join it to the process group that is there; nothing is compiled.

    Raises:
        ValueError: It cannot be imported, or is of another version.
    """
    deepspeed = import_deepspeed(ranks)
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())
    return deepspeed


def import_deepspeed(ranks: Ranks):
    """Import DeepSpeed for the device of this process; nothing is compiled.

    Raises:
        ValueError: It cannot be imported, or is of another version.
    """
    os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # which it asks for even without a launcher
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(f"engine.kind=deepspeed needs the package deepspeed ({error}): sh launch/install.sh") from None
    if not deepspeed.__version__.startswith(SUPPORTED):
        raise ValueError(
            f"engine.kind=deepspeed was written for DeepSpeed {SUPPORTED}x, not {deepspeed.__version__}: "
            "sh launch/install.sh"
        )
    # It calls collectives by the names they had before torch 2.13; each rank would say so a dozen times.
    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+_tensor` is deprecated", category=FutureWarning)
    # DeepSpeed would compile a shared-memory all-reduce for the CPU at start-up, which only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Turn what DeepSpeed refuses, in any of its ways, into a ValueError of one line."""
    from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException
    from deepspeed.runtime.config import DeepSpeedConfigError

    operators = (MissingCUDAException, CUDAMismatchException)
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, AssertionError, RuntimeError, DeepSpeedConfigError, *operators) as error:
        raise ValueError(f"engine.deepspeed: DeepSpeed refuses it: {' '.join(str(error).split())[:500]}") from error


@dataclass(frozen=True)
class _Run:
    """Which elements of a parameter this rank holds, and where."""

    flat: Tensor
    """One of DeepSpeed's flat float32 master weights."""
    position: int
    """Where in it the run begins."""
    start: int
    """Where in the parameter the run begins."""
    count: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the run in `flat`, a tensor laid out like the master weights."""
        return flat.detach().narrow(0, self.position, self.count)


class DeepSpeedEngine(Engine):
    """An engine whose parameters are DeepSpeed's; distributed experts are plain parameters of this rank's experts.

    DeepSpeed looks at the gradient norm on the host in every step: this engine cannot run ahead of the device.
    """

    deepspeed: Any  # DeepSpeed has no types
    zero: Any
    optimizer: Any

    def __init__(self, settings: EngineSettings, ranks: Ranks, objective: Objective) -> None:
        super().__init__(settings, ranks, objective)
        self.stage = zero_stage(settings.engine)
        self.name = f"deepspeed ZeRO-{self.stage}"
        check_layout(settings.parallel)
        self.layout = plan_layout(settings.parallel, settings.model.num_local_experts, ranks.world_size)
        configuration = deepspeed_settings(settings, self.layout)
        check_frozen(configuration, settings.optim.freeze)
        with torch.device("meta"):
            self.model = GptOss(settings.model)
        check_offload(configuration, sum(p.numel() for p in self.model.parameters()), self.layout)
        self.shapes = {name: p.shape for name, p in self.model.named_parameters()}
        self.library, self.configuration = load_deepspeed(ranks), configuration
        meshes = build_meshes(self.layout, ranks.device.type)
        self.exchange = place_experts(self.model, settings.train.precision, settings.parallel, meshes)
        if self.exchange is not None:
            _hold_experts(self.model, self.layout.expert_parallel)
        if meshes.context is not None:
            split_sequences(self.model, meshes.context)
        wrap_blocks(self.model, settings.train)

    def materialize(self, *, initial: bool = True) -> None:
        """Hand the model to DeepSpeed, which allocates all it holds, and fill in the initial weights."""
        settings, configuration = self.settings, self.configuration
        dtype = DTYPES[settings.train.precision]
        with _in_one_line():
            _materialize(self.model, dtype, self.ranks.device, configuration if self.stage == 3 else None)
            freeze(self.model, settings.optim.freeze)
            by_home = parameter_groups(self.model, settings.optim, lambda p: getattr(p, "group_name", None))
            groups = [{**group, "moe": True, "name": home} if home else group for home, group in by_home]
            self.deepspeed, self.zero, *_ = self.library.initialize(
                model=self.model,
                optimizer=adamw(groups, settings.optim),
                config=configuration,
                dist_init_required=False,
            )
        self.module = self.deepspeed
        self._prepare_routers()
        if self.finder is not None:
            self.finder.watch_gradients(self.model.named_parameters())
        self.optimizer = self.zero.optimizer
        self.flats = self._flats()
        allocate_state(self.optimizer, self.flats)
        if initial:
            self._fill()

    def _flats(self) -> list[Tensor]:
        """Return DeepSpeed's float32 master weights: this rank's share of each group of parameters, in one piece."""
        zero = self.zero
        if self.stage == 3:
            return zero.fp32_partitioned_groups_flat
        # Stage 1 in bf16 has an optimizer of its own.
        return getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition

    def _fill(self) -> None:
        """Draw the initial master weights, each rank its own runs."""
        model, seed = self.settings.model, self.settings.seed
        for name, parameter in self.model.named_parameters():
            run, first, shape = self._run(parameter), self._first_expert(parameter), self.shapes[name]
            parts = boxes(run.of(run.flat), run.start, _shape(parameter))
            if len(parts) > 1 and ".experts." not in name:
                # Every part of these is cut from the same draw of the whole: once is enough.
                drawn = torch.empty(shape)
                fill(drawn, name, shape, model, seed)
                run.of(run.flat).copy_(drawn.view(-1)[run.start : run.start + run.count])
                continue
            for offset, values in parts:
                fill(values, name, shape, model, seed, (offset[0] + first, *offset[1:]))
        for name, buffer in self.model.named_buffers():
            fill(buffer, name, buffer.shape, model, seed)
        self._weights_from_master()

    # One step --------------------------------------------------------------------------------------------------------

    def held(self) -> dict[str, list[Tensor]]:
        """Return DeepSpeed's flat tensors and what shares their memory, its gradient buffers included."""
        parameters: list[Any] = list(self.model.parameters())
        # Under ZeRO 3 a parameter is empty while it is not gathered, and its share is an attribute of it; so is the
        # copy within a node (hpZ).
        shares = [getattr(p, name, None) for p in parameters for name in ("ds_tensor", "ds_secondary_tensor")]
        return {
            "weights": [
                *(p.data for p in parameters),
                *(share.data for share in shares if share is not None),
                *self.model.buffers(),
                *self.flats,
                *_tensors_of(self.zero, *_WEIGHTS),
            ],
            "optimizer": [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)],
            "gradients": [
                *(p.grad for p in (*parameters, *self.flats) if p.grad is not None),
                *(p.grad_accum for p in parameters if getattr(p, "grad_accum", None) is not None),
                *_tensors_of(self.zero, *_GRADIENTS),
                *(t for bucket in getattr(self.zero, "ipg_buckets", {}).values() for t in _tensors(bucket.buffer)),
            ],
        }

    def _begin_micro_batch(self, last: bool) -> None:
        self.deepspeed.set_gradient_accumulation_boundary(last)

    def _backward(self, loss: Tensor) -> None:
        self.deepspeed.backward(loss * self.ranks.world_size, scale_wrt_gas=False)

    def _gradient_squares(self) -> Tensor:
        return torch.zeros((), device=self.ranks.device)

    def _step(self, lr: float, loss: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        # DeepSpeed looks at the gradients only. Fused AdamW reads this flag and leaves no trace of such a step.
        not_finite = (~torch.isfinite(loss)).float()
        self.optimizer.found_inf = not_finite.to(next(iter(self.optimizer.state)).device)
        set_learning_rate(self.optimizer, lr)
        self.deepspeed.step()
        grad_norm = torch.as_tensor(self.deepspeed.get_global_grad_norm(), dtype=torch.float32).to(loss.device)
        return grad_norm, not_finite.clamp(min=float(self.zero.overflow))

    # State -----------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return this rank's runs of elements by name, as boxes."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            run, shape, whole = self._run(parameter), _shape(parameter), self.shapes[name]
            first, flats = self._first_expert(parameter), {"model": run.flat}
            if parameter.requires_grad:
                moments = self.optimizer.state[run.flat]
                flats |= {f"optim.{moment}": moments[moment] for moment in ("exp_avg", "exp_avg_sq")}
            for prefix, flat in flats.items():
                shard = flat_shard(run.of(flat), run.start, shape, whole=whole, first=first)
                if not parameter.requires_grad and self.stage < 3:  # the first ranks that have it write it
                    holders = self.layout.expert_parallel if hasattr(parameter, "group_name") else 1
                    shard.is_copy = self.ranks.rank >= holders
                state[f"{prefix}.{name}"] = shard
        for name, buffer in self.model.named_buffers():
            state[f"model.{name}"] = buffer
        # All parameters are updated, or skipped, together: one count serves them all.
        state["optim.step"] = next(iter(self.optimizer.state.values()))["step"].reshape(1).clone()
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Adopt the step count, and give the model what is in the master weights now."""
        for moments in self.optimizer.state.values():
            moments["step"].copy_(state["optim.step"][0])
        self._weights_from_master()

    def _run(self, parameter: Any) -> _Run:
        zero = self.zero
        if not parameter.requires_grad:  # no master weights: what the model computes with is all there is
            return self._frozen_run(parameter)
        if self.stage == 3:
            index, position, _ = zero.grad_position[zero.get_param_id(parameter)]
            share = parameter.partition_numel()
            start = share * torch.distributed.get_rank(parameter.ds_process_group)
            count = min(max(parameter.ds_numel - start, 0), share)
            return _Run(self.flats[index], position, start if count else 0, count)
        if (mapping := parameter._hp_mapping) is None:
            return _Run(self.flats[0], 0, 0, 0)
        held = mapping.hp_fragment_address
        return _Run(self.flats[mapping.param_group_index], held.start, mapping.lp_fragment_address.start, held.numel)

    def _frozen_run(self, parameter: Any) -> _Run:
        if self.stage == 3:
            share = parameter.partition_numel()
            start = share * torch.distributed.get_rank(parameter.ds_process_group)
            count = min(max(parameter.ds_numel - start, 0), share)
            return _Run(parameter.ds_tensor.data.view(-1), 0, start if count else 0, count)
        return _Run(parameter.data.view(-1), 0, 0, parameter.numel())

    def _first_expert(self, parameter: nn.Parameter) -> int:
        """Return the index in the whole parameter of the first row that this rank's parameter has."""
        if not hasattr(parameter, "group_name"):
            return 0
        return _shape(parameter)[0] * (self.ranks.rank % self.layout.expert_parallel)

    @torch.no_grad()
    def _weights_from_master(self) -> None:
        """Write the float32 master weights into those that the model computes with."""
        zero = self.zero
        if self.stage < 3:
            zero.update_lp_params()
            return
        # As at the end of DeepSpeed's own step: small parameters that stay gathered are taken apart, every share is
        # written back wherever it lives, copies within a node (hpZ) are dropped, small parameters gathered anew.
        if persistent := zero.persistent_parameters:
            persistent[0].partition(persistent)
        for index in range(len(self.flats)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        parameter: Any
        for parameter in self.model.parameters():  # frozen ones too, which DeepSpeed's own function leaves out
            parameter.ds_secondary_tensor = None
        if persistent:
            persistent[0].all_gather(persistent)


def _tensors_of(zero: Any, *names: str) -> list[Tensor]:
    return [tensor for name in names for tensor in _tensors(getattr(zero, name, None))]


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in lists and dictionaries of any depth."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape that the parameter had before ZeRO 3 took it apart."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _hold_experts(model: GptOss, expert_parallel: int) -> None:
    """Turn the experts' DTensors into plain parameters of this rank's experts, and tell DeepSpeed who else has them.

    In DeepSpeed's words: such a parameter is not replicated over all ranks (`allreduce`), but over those that hold the
    same experts (`group_name`), and ZeRO 3 shards it over those too.
    """
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.utils import groups

    class _DistributedExperts(AutoEPMoELayer):
        """A layer without parameters or computation: DeepSpeed sees distributed experts only if it finds this class."""

        num_experts = expert_parallel  # which the engine only writes down

        def __init__(self) -> None:
            nn.Module.__init__(self)

        def set_deepspeed_parallelism(self, *args, **kwargs) -> None:
            """Do nothing, because the groups are there already."""

    name = f"ep_size_{expert_parallel}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(expert_parallel_size_=expert_parallel)
    for layer in model.blocks:
        experts = layer.mlp.experts
        for key, parameter in list(experts.named_parameters(recurse=False)):
            held: Any = nn.Parameter(local(parameter.detach()))
            held.allreduce, held.group_name = False, name
            held.ds_zero_placement_family, held.ds_zero_partition_group_name = "autoep_expert", name
            held.ds_zero_partition_process_group = groups._get_expert_data_parallel_group(name)
            setattr(experts, key, held)
    model.distributed_experts = _DistributedExperts()


def _materialize(model: GptOss, dtype: torch.dtype, device: torch.device, zero3: dict[str, Any] | None) -> None:
    """Give the meta model memory, in place; the values come later.

    Args:
        model: A model on the meta device.
        dtype: The type of what is computed with.
        device: Where the memory is.
        zero3: Settings of ZeRO 3, to shard each parameter as soon as it exists, so that no rank ever holds the whole
            model.
    """
    if zero3 is not None:
        from deepspeed import zero

        sharder = zero.Init(config_dict_or_path=zero3, dtype=dtype)
    twins: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in twins:
                twin = nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=device))
                twin.__dict__.update(parameter.__dict__)
                if zero3 is not None:
                    sharder._convert_to_zero_parameters([twin])
                twins[parameter] = twin
            setattr(module, name, twins[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
    if zero3 is not None:
        # The head's weight is read by the model itself, fused with the loss, and not by the head's forward pass.
        zero.register_external_parameter(model, model.lm_head.weight)
