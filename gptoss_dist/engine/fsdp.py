"""Training engine on torch FSDP2: float32 master weights and optimizer state, sharded over all ranks.

Shapes: B samples, T tokens, L layers, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gptoss_dist.config import Config
from gptoss_dist.engine.optimizer import build_optimizer, local
from gptoss_dist.model.init import fill
from gptoss_dist.model.losses import balance_loss, z_loss
from gptoss_dist.model.transformer import IGNORE_INDEX, GptOss
from gptoss_dist.parallel.context import Context
from gptoss_dist.parallel.parallelize import parallelize


class StepResult(NamedTuple):
    """Device tensors of one optimizer step, over all ranks; reading them synchronises, so read them late."""

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


class FsdpEngine:
    """A model and its optimizer, sharded. The loss does not depend on how many ranks share the global batch."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config, self.context = config, context
        with torch.device("meta"):
            model = GptOss(config.model)
        self.model = parallelize(model, config, context.mesh)
        self.model.to_empty(device=context.device)
        for module in self.model.modules():
            if hasattr(module, "jitter"):
                module.jitter = config.loss.router_jitter
        for name, parameter in self.model.named_parameters():
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            assert tuple(shape) == tuple(local(parameter).shape)
            fill(local(parameter).data, name, parameter.shape, config.model, config.run.seed, tuple(offset))
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
        squares = torch.stack(torch._foreach_norm(gradients)).float().square().sum()
        # One reduction carries everything that the ranks have to agree on or report.
        flag = torch.full_like(loss, float(stop))
        packed = self.context.sum(torch.cat([torch.stack([loss, aux, z, squares, flag]), entropy_L]))
        loss, aux, z, squares, flag = packed[:5]
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
        return StepResult(loss, aux, z, packed[5:], counts_LE, grad_norm, skipped, flag)

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
        state["optim.step"] = moments["step"].reshape(1).clone()
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Adopt a state filled in place by a checkpoint: only the step count is not aliased."""
        for moments in self.optimizer.state.values():
            moments["step"].copy_(state["optim.step"][0])
