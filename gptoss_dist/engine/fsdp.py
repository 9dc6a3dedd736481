"""Training engine on torch FSDP2: float32 master weights and optimizer state, sharded over all ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.engine.base import Engine, EngineSettings, Objective
from gptoss_dist.engine.gathered import keep_gathered
from gptoss_dist.engine.optimizer import build_optimizer, freeze, set_learning_rate
from gptoss_dist.model.init import fill
from gptoss_dist.model.transformer import GptOss
from gptoss_dist.parallel.mesh import build_meshes, local, plan_layout
from gptoss_dist.parallel.parallelize import parallelize


class FsdpEngine(Engine):
    """An engine whose parameters are DTensors of their whole shape.

    On CUDA nothing here makes the host wait inside a step; `docs/cuda_trace.md` lists what does.
    """

    name = "fsdp"

    def __init__(self, settings: EngineSettings, ranks: Ranks, objective: Objective) -> None:
        super().__init__(settings, ranks, objective)
        self.layout = plan_layout(settings.parallel, settings.model.num_local_experts, ranks.world_size)
        with torch.device("meta"):
            self.model = self.module = GptOss(settings.model)
        meshes = build_meshes(self.layout, ranks.device.type)
        self.exchange = parallelize(self.model, settings.train, settings.parallel, meshes)
        self.sharded = cast(FSDPModule, self.model)

    def materialize(self, *, initial: bool = True) -> None:
        """Allocate parameters and optimizer state, and fill in the initial weights."""
        self.model.to_empty(device=self.ranks.device)
        freeze(self.model, self.settings.optim.freeze)
        self._prepare_routers()
        if initial:
            self._fill()
        # Fused AdamW reads two attributes that its class does not declare, `grad_scale` and `found_inf`.
        self.optimizer: Any = build_optimizer(self.model, self.settings.optim)

    def _fill(self) -> None:
        """Draw the initial weights, each rank its own part."""
        model, seed = self.settings.model, self.settings.seed
        for name, parameter in self.model.named_parameters():
            assert isinstance(parameter, DTensor)
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            assert tuple(shape) == tuple(local(parameter).shape)
            fill(local(parameter).data, name, parameter.shape, model, seed, tuple(offset))
        for name, buffer in self.model.named_buffers():
            fill(buffer, name, buffer.shape, model, seed)

    def held(self) -> dict[str, list[Tensor]]:
        """Return this rank's shards of weights, moments and gradients."""
        parameters = list(self.model.parameters())
        return {
            "weights": [local(p.detach()) for p in parameters] + list(self.model.buffers()),
            "optimizer": [local(t) for state in self.optimizer.state.values() for t in state.values()],
            "gradients": [local(p.grad) for p in parameters if p.grad is not None],
        }

    def keep_gathered(self) -> AbstractContextManager:
        """Return a context in which blocks stay gathered if they fit; see `Engine.keep_gathered`."""
        if not self.settings.parallel.reshard_after_forward or self.ranks.world_size == 1:
            return super().keep_gathered()  # they stay anyway
        itemsize = 2 if self.settings.train.precision == "bf16" else 4
        return keep_gathered(self.model, self.ranks, self.layout.expert_parallel, itemsize)

    def _begin_micro_batch(self, last: bool) -> None:
        self.sharded.set_requires_gradient_sync(last)
        self.sharded.set_is_last_backward(last)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _gradient_squares(self) -> Tensor:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        unused = [name for name, p in trained.items() if p.grad is None]
        assert not unused, f"no gradient reached {unused}"
        if self.finder is not None:
            self.finder.look_at_gradients(
                (n, local(p.grad)) for n, p in reversed(trained.items()) if p.grad is not None
            )
        gradients = [local(p.grad) for p in trained.values() if p.grad is not None]
        # Each rank holds another part of the gradient, however it is sharded, save for copies of the whole model.
        return torch.stack(torch._foreach_norm(gradients)).float().square().sum() / self.layout.replicate

    def _step(self, lr: float, loss: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        grad_norm = squares.sqrt()
        # The optimizer's kernel reads this flag on the device: a step with a non-finite value leaves no trace.
        skipped = (~(torch.isfinite(grad_norm) & torch.isfinite(loss))).float()
        # Clipping happens inside the optimizer's kernel, which divides gradients as it reads them.
        clip_norm = self.settings.optim.clip_norm
        self.optimizer.grad_scale = ((grad_norm + 1e-6) / clip_norm).clamp(min=1.0) if clip_norm else None
        self.optimizer.found_inf = skipped
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm, skipped

    def state(self) -> dict[str, Tensor]:
        """Return all that training changes, as DTensors by name."""
        # A forward pass without a backward (validation, samples) can leave gathered copies in the parameters' place.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        state = {}
        for name, parameter in self.model.named_parameters():
            state[f"model.{name}"] = parameter.detach()
            if not parameter.requires_grad:
                continue
            moments = self.optimizer.state[parameter]
            state[f"optim.exp_avg.{name}"] = moments["exp_avg"]
            state[f"optim.exp_avg_sq.{name}"] = moments["exp_avg_sq"]
        for name, buffer in self.model.named_buffers():
            state[f"model.{name}"] = buffer
        # All parameters are updated, or skipped, together: one count serves them all.
        state["optim.step"] = next(iter(self.optimizer.state.values()))["step"].reshape(1).clone()
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Adopt the step count; all else is aliased."""
        for moments in self.optimizer.state.values():
            moments["step"].copy_(state["optim.step"][0])
