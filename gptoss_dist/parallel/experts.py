"""The experts of a layer on megablocks' dropless dispatch (MegaBlocks, arXiv:2211.15841), on one process or several.

megablocks sorts token-expert pairs, moves rows to their experts and back, and differentiates both; the expert MLP and
the parameters, with their names and layouts, are those of `gptoss_dist.model.moe.Experts`.

Importing this file imports megablocks (and Triton): do it only where it is used.

Shapes: T tokens, D hidden_size, E experts, K experts per token, N = T * K token-expert pairs; with expert parallelism
R processes, L = E / R local experts, M rows received.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from gptoss_dist.model.moe import Experts
from gptoss_dist.model.transformer import GptOss
from gptoss_dist.ops.backends import AUTO
from gptoss_dist.ops.experts import few_rows
from gptoss_dist.ops.experts.grouped_experts import grouped_experts
from gptoss_dist.parallel.exchange import Exchange
from gptoss_dist.parallel.megablocks_compat import load_megablocks
from gptoss_dist.parallel.mesh import local

megablocks = load_megablocks()


class _Arguments(megablocks.arguments.Arguments):  # type: ignore[name-defined]
    """megablocks' arguments without its refusal to go without the `grouped_gemm` package, which nothing here needs."""

    def __post_init__(self) -> None:
        pass


class DroplessExperts(megablocks.dmoe.ParallelDroplessMLP):  # type: ignore[name-defined]
    """A drop-in for `Experts`, with the same parameters and the same results; no token is dropped.

    It holds no state between calls and never touches megablocks' global lists of losses, so recomputation under
    activation checkpointing is safe.
    """

    def __init__(self, experts: Experts, num_experts_per_tok: int, exchange: Exchange | None = None) -> None:
        """Take over the parameters of `experts`: the very same objects, on whatever device they are.

        Args:
            experts: The experts whose parameters are taken over.
            num_experts_per_tok: Experts per token, K.
            exchange: What reaches the processes over which the experts are distributed, if they are. The parameters are
                then DTensors of the whole shape, sharded on dimension 0 over those processes.
        """
        E, D, F = experts.gate_up_proj.shape
        # Upstream builds MLPs of its own: on the meta device they cost nothing, and they are dropped below.
        super().__init__(
            _Arguments(
                hidden_size=D,
                ffn_hidden_size=max(F // 2, 128),  # used by upstream's block-sparse MLP only, which cannot take less
                moe_num_experts=E,
                moe_top_k=num_experts_per_tok,
                moe_loss_weight=0.0,
                mlp_type="mlp",
                mlp_impl="grouped",
                bias=False,
                return_bias=False,
                fp16=False,
                device="meta",
            )
        )
        del self.mlp
        self.exchange = exchange
        self.activation = experts.activation
        self.backend = experts.backend
        self.gate_up_proj = experts.gate_up_proj
        self.gate_up_proj_bias = experts.gate_up_proj_bias
        self.down_proj = experts.down_proj
        self.down_proj_bias = experts.down_proj_bias

    def forward(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        """Return the sum over k of weight * expert(x), [T, D] in x's dtype.

        Args:
            x_TD: Tokens.
            weights_TK: Router weights, in x's dtype or float32.
            indices_TK: Expert of each pair, any integer dtype.

        Raises:
            LocalError: On CUDA, the rows of this process times D are 2^31 or more, beyond what the kernels can address.
        """
        weight = local(self.gate_up_proj)
        if self.exchange is None and self.backend == AUTO and few_rows.serves(x_TD, indices_TK, weight):
            return few_rows.experts_of_few_rows(
                x_TD,
                weights_TK,
                indices_TK,
                weight,
                local(self.gate_up_proj_bias),
                local(self.down_proj),
                local(self.down_proj_bias),
                **self.activation,
            )
        if self.exchange is None:
            return self.forward_fn(x_TD, weights_TK, indices_TK)[0]
        return self._over_processes(self.exchange, x_TD, weights_TK, indices_TK)

    @torch.compiler.disable  # how many rows go where is known to the host only at run time
    def _over_processes(self, exchange: Exchange, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        """Send tokens to the processes of their experts, compute there, and bring the results back.

        This is upstream's `parallel_forward_once` with one look of the host at the device instead of two, results that
        recomputation can keep, and row counts that stay on the device for the expert MLP.
        """
        ops = megablocks.ops
        exchange.counting = self.training
        with torch.no_grad():
            order_N, bin_ids_N, bins_E, sent_E = self.indices_and_bins(indices_TK.flatten())
            (sent, received), received_RL = exchange.counts(sent_E.view(exchange.size, -1))
        x_ND = ops.gather(x_TD, order_N, bin_ids_N, bins_E, self.top_k)
        x_MD = exchange.rows(x_ND, sent, received)
        # Rows arrive sorted by source, then expert; the experts want them sorted by expert.
        with torch.no_grad():
            L = received_RL.shape[1]
            expert_RL = torch.arange(L, dtype=torch.int32, device=x_TD.device).repeat(exchange.size)
            expert_M = ops.replicate(
                expert_RL[None], ops.inclusive_cumsum(received_RL.flatten(), 0).view(-1), len(x_MD)
            )
            bin_ids_M, order_M = ops.sort(expert_M.flatten(), self.sort_end_bit)
            received_L = received_RL.sum(0, dtype=torch.int32)
            bins_L = ops.inclusive_cumsum(received_L, 0).view(-1)
        x_MD = ops.gather(x_MD, order_M, bin_ids_M, bins_L, 1)
        y_MD = self.mlp(x_MD, received_L)
        y_MD = ops.scatter(y_MD, order_M, bin_ids_M, None, bins_L, 1)
        y_ND = exchange.rows(y_MD, received, sent)
        return ops.scatter(y_ND, order_N, bin_ids_N, weights_TK.flatten(), bins_E, self.top_k)

    def mlp(self, x_ND: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        """Apply the expert MLPs to rows sorted by expert, [N, D] -> [N, D].

        Upstream calls this between its permutations.
        """
        return grouped_experts(
            x_ND,
            tokens_per_expert_E,
            local(self.gate_up_proj),
            local(self.gate_up_proj_bias),
            local(self.down_proj),
            local(self.down_proj_bias),
            backend=self.backend,
            **self.activation,
        )


def use_megablocks(model: GptOss, expert_parallel: DeviceMesh | None = None) -> Exchange | None:
    """Swap the experts of every layer of a `GptOss` for `DroplessExperts`, in place.

    On one process parameters stay the same objects under the same names, so optimizers and state dicts made before
    remain valid. It works on any device, meta included, and does nothing to layers already swapped, whatever the mesh.

    Args:
        model: The model.
        expert_parallel: One-dimensional mesh to distribute each layer's experts over. Expert parameters are then
            replaced by DTensors of the same (whole) shape, of which this process holds a contiguous block of experts.

    Returns:
        What the layers reach each other through, if the experts are distributed.

    Raises:
        ValueError: The mesh does not divide the experts.
    """
    swapped = [e for e in (layer.mlp.experts for layer in model.blocks) if isinstance(e, DroplessExperts)]
    exchange = swapped[0].exchange if swapped else None
    if not swapped and expert_parallel is not None and expert_parallel.size() > 1:
        exchange = Exchange(expert_parallel.get_group(), torch.device(expert_parallel.device_type))
    for layer in model.blocks:
        experts = layer.mlp.experts
        if isinstance(experts, Experts):
            if exchange is not None and expert_parallel is not None:
                _distribute(experts, expert_parallel)
            layer.mlp.experts = DroplessExperts(experts, model.config.num_experts_per_tok, exchange)
    return exchange


def _distribute(experts: Experts, mesh: DeviceMesh) -> None:
    """Keep this process's block of experts only, as DTensors."""
    for name, parameter in experts.named_parameters(recurse=False):
        E = parameter.shape[0]
        if E % mesh.size():
            raise ValueError(f"{E} experts cannot be distributed evenly over {mesh.size()} processes")
        block = parameter.detach().tensor_split(mesh.size())[mesh.get_local_rank()].clone()
        setattr(experts, name, nn.Parameter(DTensor.from_local(block, mesh, [Shard(0)], run_check=False)))
