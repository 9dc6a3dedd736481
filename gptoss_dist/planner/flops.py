"""Model FLOPs of a GPT-OSS style network, peak rates of devices, and the MFU that follows from both.

Convention, named wherever a utilisation is printed (`MFU_CONVENTION`): *model FLOPs*. Only matrix products count, two
FLOPs per multiply-add; the backward pass costs twice the forward; recomputation under activation checkpointing, masked
query-key pairs, norms, softmax, biases and the optimizer count nothing (PaLM, arXiv:2204.02311, appendix B, but with
the exact number of visible pairs instead of `12 L H Q T`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch, which it imports, is not needed to count
    from gptoss_dist.planner.hardware import Peak

MFU_CONVENTION = "model FLOPs: 3 x forward matmuls, exact visible attention pairs, no recomputation"
BACKWARD_OVER_FORWARD = 2


@dataclass(frozen=True)
class FlopCount:
    """Forward matmul FLOPs per token, averaged over one sequence and summed over layers."""

    attention_projections: float
    attention_scores: float
    """Query-key and probability-value products over visible pairs only."""
    router: float
    experts: float
    """The `num_experts_per_tok` routed experts that a token really passes."""
    shared_experts: float
    head: float

    @property
    def forward(self) -> float:
        """FLOPs per token of one forward pass."""
        return sum(dataclasses.astuple(self))

    @property
    def training(self) -> float:
        """FLOPs per token of one forward and one backward pass."""
        return self.forward * (1 + BACKWARD_OVER_FORWARD)

    def step(self, tokens: int) -> float:
        """Return the FLOPs of a training step over `tokens` tokens, all ranks and micro-batches together."""
        return self.training * tokens

    def shares(self) -> dict[str, float]:
        """Return the fraction of the total for each part; the fractions add up to 1."""
        return {name: value / self.forward for name, value in dataclasses.asdict(self).items()}

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.shares().items() if share)
        return f"{self.training / 1e9:.4g} GFLOP/token to train ({shares}; {MFU_CONVENTION})"


def visible_pairs(seq_len: int, window: int | None = None) -> int:
    """Return the number of query-key pairs that a causal mask leaves visible in one sequence.

    Args:
        seq_len: Tokens in the sequence.
        window: Keys visible to a query on a sliding layer, counting its own; None for full causal attention.
    """
    window = seq_len if window is None else min(window, seq_len)
    # The first `window` queries see 1, 2, ..., window keys; every later one sees `window`.
    return window * (window + 1) // 2 + (seq_len - window) * window


def flops_per_token(config: Any, seq_len: int) -> FlopCount:
    """Count the matrix products of the model at sequence length `seq_len`.

    Args:
        config: A `ModelConfig` or `transformers.GptOssConfig` (shared experts are read where the config has them).
        seq_len: Tokens per sequence, each attending over its own sequence without document boundaries.

    Raises:
        ValueError: `seq_len` is not positive.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} must be at least 1")
    hidden = config.hidden_size
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    layers = config.num_hidden_layers

    pairs = sum(
        visible_pairs(seq_len, config.sliding_window if layer_type == "sliding_attention" else None)
        for layer_type in config.layer_types or ()
    )
    return FlopCount(
        attention_projections=2 * layers * hidden * (2 * q_width + 2 * kv_width),
        attention_scores=4 * q_width * pairs / seq_len,
        router=2 * layers * hidden * config.num_local_experts,
        experts=2 * layers * config.num_experts_per_tok * 3 * hidden * config.intermediate_size,
        shared_experts=2 * layers * config.num_shared_experts * 3 * hidden * config.intermediate_size,
        head=2 * hidden * config.vocab_size,
    )


def mfu(flops: FlopCount, tokens_per_s_per_device: float, peak: Peak) -> float:
    """Return the model FLOPs utilisation as a fraction of `peak`, by `MFU_CONVENTION`."""
    return flops.training * tokens_per_s_per_device / peak.value
