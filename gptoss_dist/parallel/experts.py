"""The experts of a layer on megablocks' dropless dispatch (MegaBlocks, arXiv:2211.15841).

megablocks sorts token-expert pairs, moves rows to their experts and back, and differentiates both; the expert MLP and
the parameters, with their names and layouts, are those of `gptoss_dist.model.moe.Experts`.

Importing this file imports megablocks (and Triton): do it only where it is used.

Shapes: T tokens, D hidden_size, E experts, K experts per token, N = T * K token-expert pairs.
"""

from __future__ import annotations

from torch import Tensor, nn

from gptoss_dist.model.moe import Experts
from gptoss_dist.ops.grouped_experts import grouped_experts
from gptoss_dist.parallel.megablocks_compat import load_megablocks

megablocks = load_megablocks()


class _Arguments(megablocks.arguments.Arguments):
    """megablocks' arguments without its refusal to go without the `grouped_gemm` package, which nothing here needs."""

    def __post_init__(self) -> None:
        pass


class DroplessExperts(megablocks.dmoe.ParallelDroplessMLP):
    """Drop-in for `Experts`: the same parameters, the same results, no token dropped.

    Holds no state between calls and never touches megablocks' global lists of losses, so recomputation under
    activation checkpointing is safe.
    """

    def __init__(self, experts: Experts, num_experts_per_tok: int) -> None:
        """Take over the parameters of `experts`: the very same objects, on whatever device they are."""
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
        self.activation = experts.activation
        self.backend = experts.backend
        self.gate_up_proj = experts.gate_up_proj
        self.gate_up_proj_bias = experts.gate_up_proj_bias
        self.down_proj = experts.down_proj
        self.down_proj_bias = experts.down_proj_bias

    def forward(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        """Returns sum over k of weight * expert(x), [T, D] in x's dtype.

        Args:
            x_TD: tokens.
            weights_TK: router weights, in x's dtype or float32.
            indices_TK: expert of each pair, any integer dtype.

        Raises:
            ValueError: on CUDA, T * K * D is 2^31 or more, beyond what the kernels can address.
        """
        y_TD, _ = self.forward_fn(x_TD, weights_TK, indices_TK)
        return y_TD

    def mlp(self, x_ND: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        """The expert MLPs on rows sorted by expert, [N, D] -> [N, D]; upstream calls this between its permutations."""
        return grouped_experts(
            x_ND,
            tokens_per_expert_E,
            self.gate_up_proj,
            self.gate_up_proj_bias,
            self.down_proj,
            self.down_proj_bias,
            backend=self.backend,
            **self.activation,
        )


def use_megablocks(model: nn.Module) -> None:
    """Swap the experts of every layer of a `GptOss` for `DroplessExperts`, in place.

    Parameters stay the same objects under the same names, so optimizers and state dicts made before remain valid.
    Works on any device, meta included, and does nothing to layers already swapped.
    """
    for layer in model.model.layers:
        if isinstance(layer.mlp.experts, Experts):
            layer.mlp.experts = DroplessExperts(layer.mlp.experts, model.config.num_experts_per_tok)
