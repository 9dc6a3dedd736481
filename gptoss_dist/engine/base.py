"""What every engine does: global losses over micro-batches, one reduction per step, what a step reports.

An engine owns the sharded parameters, the backward pass and the optimizer step. `fsdp.py` and `deepspeed.py` differ in
who shards, reduces and steps; the numbers they give are the same.

Shapes: B samples, T tokens, L layers, E experts, R ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gptoss_dist.config import EngineConfig, LossConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.engine.non_finite import NonFiniteFinder
from gptoss_dist.model.losses import balance_loss, updated_selection_bias, z_loss
from gptoss_dist.model.transformer import IGNORE_INDEX, GptOss, LossSums
from gptoss_dist.parallel.exchange import Exchange
from gptoss_dist.parallel.forced_routing import force_routing
from gptoss_dist.parallel.mesh import DeviceLayout


@dataclass
class EngineSettings:
    """The sections of the configuration that an engine reads, and the seed of the initial weights."""

    model: ModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    seed: int = 0


class Objective(Protocol):
    """What a model is trained for; `train/objectives.py` has them."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> LossSums:
        """Return the sums that the loss of a batch is made of.

        Args:
            model: A `GptOss`, or an engine's wrapper around one.
            batch: Tensors by name, as `data_pipeline.BatchLoader` hands out, on the engine's device.
        """


class StepSums(NamedTuple):
    """What the micro-batches of a step add up to: this rank's share, but for the counts, which are of all ranks."""

    loss: Tensor
    aux: Tensor
    z: Tensor
    entropy_L: Tensor
    counts_LE: Tensor


class StepResult(NamedTuple):
    """What one optimizer step gave, over all ranks, on the host.

    On CUDA it is still on its way there until `wait` returns.
    """

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
    """With expert parallelism, for each rank: token copies that its experts computed, bytes that its all-to-alls sent
    to other ranks, and seconds in all-to-alls (on CUDA those that have finished, mostly of the step before)."""
    arrived: torch.cuda.Event | None = None
    """Marks the end of the copies to the host."""

    def wait(self) -> StepResult:
        """Wait for this step, and not for those that were launched after it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self


class Engine(ABC):
    """A model and its optimizer, sharded.

    The loss does not depend on how many ranks share the global batch.

    A subclass builds `model`, `layout` and `exchange` on the meta device; `materialize` makes the rest.
    """

    name: str
    """The engine and what it shards, in words."""
    model: GptOss
    module: nn.Module
    """What the objective calls for training: the model, or what the engine wraps around it."""
    layout: DeviceLayout
    exchange: Exchange | None
    """The all-to-alls between experts, if they are distributed over ranks."""

    def __init__(self, settings: EngineSettings, ranks: Ranks, objective: Objective) -> None:
        self.settings, self.ranks, self.objective = settings, ranks, objective
        self.finder: NonFiniteFinder | None = None
        """With `train.find_non_finite`: what knows where the first value that is not finite arose."""

    def _prepare_routers(self) -> None:
        self.routers = [layer.mlp.router for layer in self.model.blocks]
        for router in self.routers:
            router.jitter = self.settings.loss.router_jitter
        how = self.settings.train.routing
        self.forced_routings = [] if how == "learned" else force_routing(self.model, how)
        if self.settings.train.find_non_finite:
            self.finder = NonFiniteFinder(self.model)

    # What a subclass provides ----------------------------------------------------------------------------------------

    @abstractmethod
    def materialize(self, *, initial: bool = True) -> None:
        """Allocate what the engine holds; collective.

        Args:
            initial: Fill in the initial weights. Without, they hold anything: the planner traces shapes only.
        """

    @abstractmethod
    def held(self) -> dict[str, list[Tensor]]:
        """Return the tensors that live from step to step, by what they are for; several may share memory.

        Between the backward pass and `update`, gradients are among them. Keys are `weights` (master weights and what is
        computed with, if that is kept), `optimizer` and `gradients`.
        """

    def holds(self) -> dict[str, int]:
        """Return the bytes of `held`, each block of memory counted once, under the first name that it has."""
        seen: set[int] = set()
        sizes = {}
        for role, tensors in self.held().items():
            blocks = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
            sizes[role] = sum(nbytes for block, nbytes in blocks.items() if block not in seen)
            seen |= set(blocks)
        return sizes

    @abstractmethod
    def _begin_micro_batch(self, last: bool) -> None:
        """Prepare for a forward pass; gradients are to be reduced with the `last` one at the latest."""

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Run the backward pass of this rank's share of the global loss; gradients are summed over ranks."""

    @abstractmethod
    def _gradient_squares(self) -> Tensor:
        """Return this rank's share of the squared gradient norm; 0 if `_step` computes the norm itself."""

    @abstractmethod
    def _step(self, lr: float, loss: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Clip and apply the gradients, unless they or the loss are not finite.

        Args:
            lr: Learning rate of this step.
            loss: The global loss, summed over ranks.
            squares: The squared gradient norm, summed over ranks.

        Returns:
            The gradient norm before clipping, and 1 if the update was skipped, else 0.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return all that training changes, by name, as tensors that alias the live ones; torch DCP can write them.

        Names and whole shapes are the same for every engine: `model.NAME`, float32 master weights and buffers;
        `optim.exp_avg.NAME` and `optim.exp_avg_sq.NAME`; `optim.step`.
        """

    @abstractmethod
    def load(self, state: dict[str, Tensor]) -> None:
        """Adopt what a checkpoint wrote into the tensors of `state()`."""

    # What all do -----------------------------------------------------------------------------------------------------

    def forward_backward(self, micro_batches: list[dict[str, Tensor]]) -> StepSums:
        """Run the forward and backward passes of one global batch.

        Args:
            micro_batches: This rank's share, as `data_pipeline.BatchLoader` hands out (CPU tensors).

        Returns:
            What `update` reports of the global batch.
        """
        self.model.train()
        batches = [self._to_device(batch) for batch in micro_batches]
        valid = torch.stack([(b["labels"] != IGNORE_INDEX).sum() for b in batches]).sum().float()
        valid = self.ranks.sum(valid)
        if (copies := self.layout.context_parallel) > 1:  # all ranks of a context group have the same samples
            valid = valid / copies
        valid = valid.clamp(min=1)
        sums: StepSums | None = None
        for index, batch in enumerate(batches):
            self._begin_micro_batch(index == len(batches) - 1)
            with self._stance():
                terms = self._micro_batch(batch, valid, len(batches))
            sums = terms if sums is None else StepSums(*(a + b for a, b in zip(sums, terms)))
        assert sums is not None, "a global batch has at least one micro-batch"
        return sums

    def _stance(self) -> AbstractContextManager:
        """Return a context in which nothing is compiled while routers record what `train.routing=replay` repeats.

        Recording breaks the graph, and the break would stay. The backward pass needs it too: it may compute blocks
        again.
        """
        recording = any(forced.is_recording for forced in self.forced_routings)
        return torch.compiler.set_stance("force_eager") if recording else nullcontext()

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.ranks.device, non_blocking=True) for name, tensor in batch.items()}

    def _micro_batch(self, batch: dict[str, Tensor], valid: Tensor, micro_batches: int) -> StepSums:
        """Run the backward pass of a micro-batch's share of the global loss; return detached sums for the report."""
        settings, model = self.settings.loss, self.settings.model
        token_loss, stats = self.objective(self.module, batch)
        # Balance is judged over the micro-batch of *all* ranks, so that the loss does not depend on the layout. Ranks
        # may bring different numbers of tokens; each token counts K times in every layer.
        counts_LE = self.ranks.sum(stats.counts_E.clone())
        tokens = counts_LE[0].sum() / model.num_experts_per_tok
        loss = token_loss / valid
        aux = balance_loss(stats, counts_LE, tokens, model.num_experts_per_tok) / micro_batches
        z = z_loss(stats, tokens) / micro_batches
        self._backward(loss + settings.aux_coef * aux + settings.z_coef * z)
        entropy_L = stats.entropy / (tokens * micro_batches)
        return StepSums(loss.detach(), aux.detach(), z.detach(), entropy_L.detach(), counts_LE)

    def update(self, sums: StepSums, lr: float, stop: bool = False) -> StepResult:
        """Clip and apply the gradients of `forward_backward`.

        Args:
            sums: What it returned.
            lr: Learning rate of this step.
            stop: Whether this rank was asked to stop; the result tells all ranks.
        """
        loss, aux, z, entropy_L, counts_LE = sums
        # One reduction carries everything that the ranks have to agree on or report.
        flag = torch.full_like(loss, float(stop))
        parts = [torch.stack([loss, aux, z, self._gradient_squares(), flag]), entropy_L]
        if self.exchange is not None:
            parts.append(self._traffic(self.exchange).flatten())
        loss_etc, entropy_L, *traffic = self.ranks.sum(torch.cat(parts)).split([len(part) for part in parts])
        loss, aux, z, squares, flag = loss_etc
        traffic_R3 = traffic[0].view(-1, 3) if traffic else None
        grad_norm, skipped = self._step(lr, loss, squares)
        if (rate := self.settings.loss.selection_bias_rate) and self.settings.train.routing == "learned":
            for router, counts_E in zip(self.routers, counts_LE):
                bias_E = router.selection_bias
                assert bias_E is not None, "loss.selection_bias_rate needs model.router_selection_bias"
                bias_E.copy_(updated_selection_bias(bias_E, counts_E, rate * (1 - skipped)))
        return self._to_host(StepResult(loss, aux, z, entropy_L, counts_LE, grad_norm, skipped, flag, traffic_R3))

    def _to_host(self, result: StepResult) -> StepResult:
        """Start the copies of a result to the host.

        A copy that is started when the result is read would queue behind the steps that were launched since.
        """
        if self.ranks.device.type == "cpu":
            return result
        on_host = {}
        for name, tensor in result._asdict().items():
            if tensor is not None:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                on_host[name] = host.copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return result._replace(**on_host, arrived=arrived)

    def _traffic(self, exchange: Exchange) -> Tensor:
        """Return this rank's row of `StepResult.traffic_R3`, zeros elsewhere."""
        traffic_R3 = torch.zeros(self.ranks.world_size, 3, device=self.ranks.device)
        for column, value in enumerate(exchange.take()):
            traffic_R3[self.ranks.rank, column].fill_(value)  # a kernel's argument: no copy that the host waits for
        return traffic_R3

    def keep_gathered(self) -> AbstractContextManager:
        """Return a context for many forward passes without gradients, such as generation; collective.

        In it weights are gathered once, if this engine can and they fit, and not once per pass.
        """
        return nullcontext()

    @torch.no_grad()
    def evaluate(self, batches) -> float:
        """Return the mean token loss in nats over all ranks' batches; every rank must bring the same number of them."""
        self.model.eval()
        total = torch.zeros(2, device=self.ranks.device)
        for batch in batches:
            batch = self._to_device(batch)
            sums = self.objective(self.model, batch)
            total += torch.stack([sums.token_loss, (batch["labels"] != IGNORE_INDEX).sum().float()])
        loss, count = self.ranks.sum(total).tolist()
        return loss / max(count / self.layout.context_parallel, 1.0)
