"""Training engine on torch FSDP2: float32 master weights and optimizer state, sharded over all ranks.

Shapes: B samples, T tokens, L layers, E experts, R ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gptoss_dist.config import Config
from gptoss_dist.engine.optimizer import build_optimizer
from gptoss_dist.model.init import fill
from gptoss_dist.model.losses import balance_loss, updated_selection_bias, z_loss
from gptoss_dist.model.transformer import IGNORE_INDEX, GptOss
from gptoss_dist.parallel.context import Context
from gptoss_dist.parallel.mesh import build_meshes, local, plan_layout
from gptoss_dist.parallel.parallelize import parallelize


class StepResult(NamedTuple):
    """What one optimizer step gave, over all ranks, on the host. On CUDA it is still on its way: `wait` for it."""

    loss: Tensor
    """Mean token loss in nats."""
    aux: Tensor
    """Load-balancing loss, unweighted; 1 is perfect balance."""
    z: Tensor
    """Router z-loss, unweighted."""
    entropy_L: Tensor
    """Mean routing entropy in nats per layer."""
    counts_LE: Tensor
    """Tokens routed to each expert."""
    grad_norm: Tensor
    """Global gradient norm before clipping."""
    skipped: Tensor
    """1 if the update was skipped because loss or gradient was not finite, else 0."""
    stop: Tensor
    """Number of ranks that were asked to stop."""
    traffic_R3: Tensor | None = None
    """With expert parallelism, of each rank: token copies that its experts computed, bytes that its all-to-alls sent to
    other ranks, and seconds in all-to-alls (on CUDA those that have finished, mostly of the step before)."""
    arrived: torch.cuda.Event | None = None
    """Marks the end of the copies to the host."""

    def wait(self) -> StepResult:
        """Wait for this step, and not for those that were launched after it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self


class FsdpEngine:
    """A model and its optimizer, sharded. The loss does not depend on how many ranks share the global batch."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config, self.context = config, context
        self.layout = plan_layout(config.parallel, config.model.num_local_experts, context.world_size)
        with torch.device("meta"):
            self.model = GptOss(config.model)
        self.exchange = parallelize(self.model, config, build_meshes(self.layout, context.device.type))
        self.model.to_empty(device=context.device)
        self.routers = [layer.mlp.router for layer in self.model.model.layers]
        for router in self.routers:
            router.jitter = config.loss.router_jitter
            router.forced = None if config.train.routing == "learned" else config.train.routing
        for name, parameter in self.model.named_parameters():
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            assert tuple(shape) == tuple(local(parameter).shape)
            fill(local(parameter).data, name, parameter.shape, config.model, config.run.seed, tuple(offset))
        for name, buffer in self.model.named_buffers():
            fill(buffer, name, buffer.shape, config.model, config.run.seed)
        self.optimizer = build_optimizer(self.model, config.optim)

    def forward_backward(self, micro_batches: list[dict[str, Tensor]]) -> None:
        """Forward and backward for one global batch; gradients are reduced with the last micro-batch.

        Args:
            micro_batches: this rank's share, as `data_pipeline.BatchLoader` hands out (CPU tensors).
        """
        self.model.train()
        batches = [self._to_device(batch) for batch in micro_batches]
        valid = sum((b["labels"] != IGNORE_INDEX).sum() for b in batches).float()
        valid = self.context.sum(valid).clamp(min=1)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            self.model.set_requires_gradient_sync(last)
            self.model.set_is_last_backward(last)
            terms = self._backward(batch, valid, len(batches))
            self._sums = terms if index == 0 else tuple(a + b for a, b in zip(self._sums, terms))

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.context.device, non_blocking=True) for name, tensor in batch.items()}

    def _backward(self, batch: dict[str, Tensor], valid: Tensor, micro_batches: int) -> tuple[Tensor, ...]:
        """Backward of this micro-batch's share of the global loss; returns detached sums for the report."""
        settings, model = self.config.loss, self.config.model
        token_loss, stats = self.model(batch["input_ids"], batch["labels"], document_ids_BT=batch.get("document_ids"))
        # Balance is judged over the micro-batch of *all* ranks, so that the loss does not depend on the layout.
        tokens = batch["input_ids"].numel() * self.context.world_size
        counts_LE = self.context.sum(stats.counts_E.clone())
        loss = token_loss / valid
        aux = balance_loss(stats, counts_LE, tokens, model.num_experts_per_tok) / micro_batches
        z = z_loss(stats, tokens) / micro_batches
        (loss + settings.aux_coef * aux + settings.z_coef * z).backward()
        entropy_L = stats.entropy / (tokens * micro_batches)
        return loss.detach(), aux.detach(), z.detach(), entropy_L, counts_LE

    def update(self, lr: float, stop: bool = False) -> StepResult:
        """Clip and apply the gradients of `forward_backward`. No host synchronisation on CUDA.

        Args:
            lr: learning rate of this step.
            stop: this rank was asked to stop; the result tells all ranks.
        """
        loss, aux, z, entropy_L, counts_LE = self._sums
        unused = [name for name, p in self.model.named_parameters() if p.grad is None]
        assert not unused, f"no gradient reached {unused}"
        gradients = [local(p.grad) for p in self.model.parameters()]
        # Each rank holds another part of the gradient, however it is sharded, save for copies of the whole model.
        squares = torch.stack(torch._foreach_norm(gradients)).float().square().sum() / self.layout.replicate
        # One reduction carries everything that the ranks have to agree on or report.
        flag = torch.full_like(loss, float(stop))
        parts = [torch.stack([loss, aux, z, squares, flag]), entropy_L]
        if self.exchange is not None:
            parts.append(self._traffic().flatten())
        loss_etc, entropy_L, *traffic = self.context.sum(torch.cat(parts)).split([len(part) for part in parts])
        loss, aux, z, squares, flag = loss_etc
        traffic_R3 = traffic[0].view(-1, 3) if traffic else None
        grad_norm = squares.sqrt()
        # The optimizer's kernel reads this flag on the device: a step with a non-finite value leaves no trace.
        skipped = (~(torch.isfinite(grad_norm) & torch.isfinite(loss))).float()
        # Clipping happens inside the optimizer's kernel, which divides gradients as it reads them.
        clip_norm = self.config.optim.clip_norm
        self.optimizer.grad_scale = ((grad_norm + 1e-6) / clip_norm).clamp(min=1.0) if clip_norm else None
        self.optimizer.found_inf = skipped
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if (rate := self.config.loss.selection_bias_rate) and self.config.train.routing == "learned":
            for router, counts_E in zip(self.routers, counts_LE):
                bias_E = router.selection_bias
                bias_E.copy_(updated_selection_bias(bias_E, counts_E, rate * (1 - skipped)))
        return self._to_host(StepResult(loss, aux, z, entropy_L, counts_LE, grad_norm, skipped, flag, traffic_R3))

    def _to_host(self, result: StepResult) -> StepResult:
        """Start the copies now: a copy started when the result is read would queue behind the steps launched since."""
        if self.context.device.type == "cpu":
            return result
        tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in result if t is not None]
        for host, tensor in zip(tensors, result):
            host.copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return StepResult(*tensors)._replace(arrived=arrived)

    def _traffic(self) -> Tensor:
        """This rank's row of `StepResult.traffic_R3`, zeros elsewhere."""
        traffic_R3 = torch.zeros(self.context.world_size, 3, device=self.context.device)
        for column, value in enumerate(self.exchange.take()):
            traffic_R3[self.context.rank, column].fill_(value)  # a kernel's argument: no copy that the host waits for
        return traffic_R3

    @torch.no_grad()
    def evaluate(self, batches) -> float:
        """Mean token loss in nats over all ranks' batches; every rank must bring the same number of batches."""
        self.model.eval()
        total = torch.zeros(2, device=self.context.device)
        for batch in batches:
            batch = self._to_device(batch)
            sums = self.model(batch["input_ids"], batch["labels"], document_ids_BT=batch.get("document_ids"))
            total += torch.stack([sums.token_loss, (batch["labels"] != IGNORE_INDEX).sum().float()])
        loss, count = self.context.sum(total).tolist()
        return loss / max(count, 1.0)

    def state(self) -> dict[str, Tensor]:
        """Everything that training changes, by name, as (sharded) tensors that alias the live ones."""
        # A forward pass without a backward (validation, samples) can leave gathered copies in the parameters' place.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        state = {}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state[parameter]
            state[f"model.{name}"] = parameter.detach()
            state[f"optim.exp_avg.{name}"] = moments["exp_avg"]
            state[f"optim.exp_avg_sq.{name}"] = moments["exp_avg_sq"]
        # All parameters are updated, or skipped, together: one count serves them all.
        for name, buffer in self.model.named_buffers():
            state[f"model.{name}"] = buffer
        state["optim.step"] = moments["step"].reshape(1).clone()
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Adopt a state filled in place by a checkpoint: only the step count is not aliased."""
        for moments in self.optimizer.state.values():
            moments["step"].copy_(state["optim.step"][0])
