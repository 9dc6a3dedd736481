"""The mixture of experts, readable and on one device; `parallel/experts.py` swaps in the expert-parallel one.

A router chooses K of E experts for each token. Token-expert pairs are sorted by expert, each expert's MLP computes its
rows, and every token gets the weighted sum of its K results.

Shapes: B batch, T tokens (of the sequence or flattened), D hidden_size, E experts, K experts per token,
I intermediate_size, F = 2 * I (gate and up interleaved), N = T * K token-expert pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gptoss_dist.model.config import ModelConfig
from gptoss_dist.ops.experts import few_rows
from gptoss_dist.ops.experts.grouped_experts import grouped_experts
from gptoss_dist.ops.gemm import linear


class RouterStats(NamedTuple):
    """Sums over a batch of tokens, from which losses and metrics follow.

    They are sums rather than means, so that what is added up over ranks and micro-batches is the value of the whole
    batch. The forward pass returns them instead of keeping them on the module, so that recomputation under activation
    checkpointing cannot count twice.
    """

    counts_E: Tensor
    """Tokens routed to each expert, float32, no gradient."""
    probability_E: Tensor
    """Sum of the full softmax over experts, float32, differentiable."""
    z: Tensor
    """Sum of squared log-partition of the router logits (ST-MoE, arXiv:2202.08906), differentiable."""
    entropy: Tensor
    """Sum of the routing entropy in nats, no gradient."""


class Router(nn.Module):
    """Linear layer, then top-k of the logits, then softmax over those k (GPT-OSS).

    `choose` may be replaced from outside (`parallel/forced_routing.py`).
    """

    selection_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.jitter = 0.0
        """In training, the input is multiplied by noise in [1 - jitter, 1 + jitter]; whoever trains may set it."""
        self.weight = nn.Parameter(torch.empty(E, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(E)) if config.router_bias else None
        selection_bias = torch.zeros(E, dtype=torch.float32) if config.router_selection_bias else None
        self.register_buffer("selection_bias", selection_bias)

    def forward(self, x_TD: Tensor, statistics: bool = True) -> tuple[Tensor, Tensor, RouterStats | None]:
        """Return weights [T, K] in x's dtype, expert indices [T, K] int64, and the sums for losses and metrics.

        The sums are None without `statistics`.
        """
        if self.jitter and self.training:
            # Multiplicative noise on the router's input (Switch Transformer, arXiv:2101.03961).
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        logits_TE = linear(x_TD, self.weight, self.bias)
        chosen_TK, indices_TK = self.choose(logits_TE)
        weights_TK = torch.softmax(chosen_TK, dim=-1, dtype=torch.float32).to(x_TD.dtype)
        return weights_TK, indices_TK, router_stats(logits_TE, indices_TK) if statistics else None

    def choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [T, K] of each token's experts, which carry the gradient, and their indices [T, K] int64.

        A selection bias (`updated_selection_bias`) changes the choice, and not the logits.
        """
        if self.selection_bias is None:
            return torch.topk(logits_TE, self.num_experts_per_tok, dim=-1)
        biased_TE = logits_TE.detach() + self.selection_bias
        indices_TK = torch.topk(biased_TE, self.num_experts_per_tok, dim=-1).indices
        return logits_TE.gather(-1, indices_TK), indices_TK


def router_stats(logits_TE: Tensor, indices_TK: Tensor) -> RouterStats:
    """Return the sums over tokens that the balance loss, the z-loss and the load metrics need."""
    logits_TE = logits_TE.float()
    z_T = torch.logsumexp(logits_TE, dim=-1)
    log_p_TE = logits_TE - z_T[:, None]
    p_TE = log_p_TE.exp()
    counts_E = torch.zeros(logits_TE.shape[-1], device=logits_TE.device)
    counts_E.scatter_add_(0, indices_TK.flatten(), torch.ones((), device=logits_TE.device).expand(indices_TK.numel()))
    entropy = -(p_TE.detach() * log_p_TE.detach()).sum()
    return RouterStats(counts_E, p_TE.sum(0), z_T.square().sum(), entropy)


def activation_settings(config: ModelConfig) -> dict:
    """Return the experts' activation, as arguments of `grouped_experts`."""
    return {"activation": config.expert_activation, "alpha": config.swiglu_alpha, "limit": config.swiglu_limit}


class Experts(nn.Module):
    """All experts of a layer as stacked tensors, and the dispatch of tokens to them, which drops none."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, I = config.num_local_experts, config.hidden_size, config.intermediate_size  # noqa: E741
        self.activation = activation_settings(config)
        self.backend = "auto"
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * I))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(E, 2 * I)) if config.expert_bias else None
        self.down_proj = nn.Parameter(torch.empty(E, I, D))
        self.down_proj_bias = nn.Parameter(torch.empty(E, D)) if config.expert_bias else None

    def forward(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        """Return the sum over k of weight * expert(x), [T, D] in x's dtype.

        Args:
            x_TD: Tokens.
            weights_TK: Router weights.
            indices_TK: Expert of each pair, int64.
        """
        T, K = indices_TK.shape
        if self.backend == "auto" and few_rows.serves(x_TD, indices_TK, self.gate_up_proj):
            weights = (self.gate_up_proj, self.gate_up_proj_bias, self.down_proj, self.down_proj_bias)
            return few_rows.experts_of_few_rows(x_TD, weights_TK, indices_TK, *weights, **self.activation)
        expert_N = indices_TK.flatten()
        order_N = torch.argsort(expert_N, stable=True)
        counts_E = torch.zeros(self.gate_up_proj.shape[0], dtype=torch.int64, device=x_TD.device)
        counts_E.scatter_add_(0, expert_N, torch.ones_like(expert_N))
        y_ND = self.compute(x_TD[order_N // K], counts_E)
        y_ND = y_ND * weights_TK.flatten()[order_N, None]
        # Undo the sort by writing (each row once), then add the K contributions: deterministic, unlike index_add.
        y_TKD = torch.empty_like(y_ND).index_copy(0, order_N, y_ND).view(T, K, x_TD.shape[1])
        return y_TKD.sum(dim=1)

    def compute(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Return the expert MLPs of rows that are already sorted by expert, [N, D].

        Args:
            x_ND: Rows.
            counts_E: Rows of each expert.
        """
        return grouped_experts(
            x_ND,
            counts_E,
            self.gate_up_proj,
            self.gate_up_proj_bias,
            self.down_proj,
            self.down_proj_bias,
            backend=self.backend,
            **self.activation,
        )


class SharedExpert(nn.Module):
    """A dense expert that every token passes (DeepSeekMoE, arXiv:2401.06066), laid out like a routed one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, width = config.hidden_size, config.num_shared_experts * config.intermediate_size
        self.activation = activation_settings(config)
        self.backend = "auto"
        self.gate_up_proj = nn.Parameter(torch.empty(D, 2 * width))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(2 * width)) if config.expert_bias else None
        self.down_proj = nn.Parameter(torch.empty(width, D))
        self.down_proj_bias = nn.Parameter(torch.empty(D)) if config.expert_bias else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return expert(x), [T, D] in x's dtype."""
        counts_1 = torch.full((1,), x_TD.shape[0], device=x_TD.device)
        return grouped_experts(
            x_TD,
            counts_1,
            self.gate_up_proj[None],
            None if self.gate_up_proj_bias is None else self.gate_up_proj_bias[None],
            self.down_proj[None],
            None if self.down_proj_bias is None else self.down_proj_bias[None],
            backend=self.backend,
            **self.activation,
        )


class MoE(nn.Module):
    """Router, routed experts, and a shared expert if the config asks for one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_expert = SharedExpert(config) if config.num_shared_experts else None

    def forward(self, x_BTD: Tensor, statistics: bool = True) -> tuple[Tensor, RouterStats | None]:
        """Return the sum of the experts' results, [B, T, D] in x's dtype, and the router's sums if asked for them."""
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        weights_TK, indices_TK, stats = self.router(x_TD, statistics)
        y_TD = self.experts(x_TD, weights_TK, indices_TK)
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD)
        return y_TD.view_as(x_BTD), stats
