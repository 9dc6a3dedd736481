"""The architecture as data: every variant of the model is a set of these fields."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_pipeline.command_line import check_ranges, ranged
from data_pipeline.foreign import check_yaml, convert, read_text
from data_pipeline.printable import printable

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass
class RopeScaling:
    """YaRN context extension (Peng et al. 2023, arXiv:2309.00071) as GPT-OSS uses it."""

    rope_type: Literal["yarn"] = "yarn"
    factor: float = ranged(32.0, at_least=1)
    """How many times longer than the original context."""
    original_max_position_embeddings: int = ranged(4096, above=0)
    """Context of the unscaled rotary embedding, in tokens."""
    beta_fast: float = ranged(32.0, above=0)
    """Dimensions turning more often than this over the original context are not interpolated."""
    beta_slow: float = ranged(1.0, above=0)
    """Dimensions turning less often than this are fully interpolated."""
    truncate: bool = False
    """Round the ramp's borders to whole dimensions (GPT-OSS does not)."""


SHAPING = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_shared_experts",
    "tie_word_embeddings",
    "attention_bias",
    "router_bias",
    "router_selection_bias",
    "expert_bias",
)
"""The settings that decide which parameters there are, and their shapes."""


@dataclass
class ModelConfig:
    """Architecture. Field names are those of `transformers.GptOssConfig`; the defaults are exact GPT-OSS.

    Fields that transformers does not have default to GPT-OSS behaviour; `gptoss_dist.checkpoint.formats.fields` lists
    them.
    """

    vocab_size: int = ranged(201088, above=0, at_most=2**31)
    """Rows of the embedding and of the head."""
    hidden_size: int = ranged(2880, above=0, at_most=2**20)
    """Width of the residual stream."""
    intermediate_size: int = ranged(2880, above=0, at_most=2**20)
    """Width of one expert."""
    num_hidden_layers: int = ranged(24, above=0, at_most=10_000)
    """Number of blocks."""
    num_attention_heads: int = ranged(64, above=0, at_most=2**16)
    """Query heads."""
    num_key_value_heads: int = ranged(8, above=0, at_most=2**16)
    """Key/value heads; divides the query heads."""
    head_dim: int = ranged(64, above=0, at_most=2**16)
    """Width of one head."""
    num_local_experts: int = ranged(32, above=0, at_most=2**16)
    """Experts per layer, over all ranks."""
    num_experts_per_tok: int = ranged(4, above=0, at_most=2**16)
    """Experts that each token is routed to (top-k)."""
    sliding_window: int = ranged(128, above=0, at_most=2**31)
    """Keys visible to a query on sliding layers, counting the query's own."""
    layer_types: list[str] | None = None
    """`sliding_attention` or `full_attention` per layer; null alternates, starting with sliding."""
    max_position_embeddings: int = ranged(131072, above=0, at_most=2**31)
    """Longest sequence, in tokens."""
    rms_norm_eps: float = ranged(1e-5, above=0)
    """Added to the mean square in RMSNorm."""
    rope_theta: float = ranged(150000.0, at_least=1)
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling | None = field(default_factory=RopeScaling)
    """YaRN; null for plain rotary embedding."""
    initializer_range: float = ranged(0.02, at_least=0)
    """Standard deviation of the normal weight initialisation."""
    tie_word_embeddings: bool = False
    """Use the embedding as the head."""
    attention_bias: bool = True
    """Biases on the q, k, v and o projections."""
    swiglu_alpha: float = 1.702
    """Gain inside the sigmoid of the `gpt_oss` activation."""
    swiglu_limit: float = ranged(7.0, above=0)
    """Clamp of gate (above) and up (both sides) in the `gpt_oss` activation."""
    router_bias: bool = True
    """Bias on the router."""
    router_selection_bias: bool = False
    """A bias per expert that is added to the router's logits for the choice of experts only, not for their weights
    (balancing without a loss, arXiv:2408.15664). GPT-OSS has none: transformers has no place for such a model."""
    expert_bias: bool = True
    """Biases on the expert projections."""
    expert_activation: Literal["gpt_oss", "silu"] = "gpt_oss"
    """`gpt_oss`: clamped gate * sigmoid(alpha * gate) * (up + 1); `silu`: plain silu(gate) * up."""
    num_shared_experts: int = ranged(0, at_least=0, at_most=2**16)
    """Experts of width `intermediate_size` that every token passes, besides the routed ones."""
    sink_init: Literal["normal", "zero"] = "normal"
    """Initial values of the attention sinks."""
    sink_clamp: list[float] | None = None
    """[low, high] limits of the sink logits; null leaves them free, as GPT-OSS does."""
    rope_pruned_fraction: float = ranged(0.0, at_least=0, below=1)
    """Share of rotary dimensions, slowest first, left unrotated on full layers (p-RoPE, arXiv:2410.06205)."""

    def __post_init__(self) -> None:
        check_ranges(self, "model.")
        if self.layer_types is None:
            self.layer_types = [FULL if i % 2 else SLIDING for i in range(self.num_hidden_layers)]
        self._check_layer_types()
        self._check_heads()
        _require(
            self.num_experts_per_tok <= self.num_local_experts,
            f"model.num_experts_per_tok={self.num_experts_per_tok} exceeds num_local_experts={self.num_local_experts}",
        )
        _require(
            self.sink_clamp is None or (len(self.sink_clamp) == 2 and self.sink_clamp[0] < self.sink_clamp[1]),
            f"model.sink_clamp={self.sink_clamp} must be [low, high] with low < high, or null",
        )
        if yarn := self.rope_scaling:
            _require(
                yarn.beta_slow <= yarn.beta_fast,
                f"model.rope_scaling.beta_slow={yarn.beta_slow} must not exceed beta_fast={yarn.beta_fast}",
            )

    @property
    def attention_types(self) -> list[str]:
        """`sliding_attention` or `full_attention` of each layer: `layer_types`, which is filled in by now."""
        assert self.layer_types is not None
        return self.layer_types

    def _check_layer_types(self) -> None:
        _require(
            len(self.attention_types) == self.num_hidden_layers,
            f"model.layer_types has {len(self.attention_types)} entries for "
            f"num_hidden_layers={self.num_hidden_layers}; give one per layer, or null to alternate",
        )
        bad = sorted(set(self.attention_types) - {SLIDING, FULL})
        _require(not bad, f"model.layer_types holds {bad}; use {SLIDING!r} or {FULL!r}")

    def _check_heads(self) -> None:
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"model.num_attention_heads={self.num_attention_heads} must be a multiple of "
            f"num_key_value_heads={self.num_key_value_heads}",
        )
        _require(self.head_dim % 2 == 0, f"model.head_dim={self.head_dim} must be even for rotary embeddings")

    @classmethod
    def from_yaml(cls, path: str | Path) -> ModelConfig:
        """Read an architecture file such as `configs/model/gptoss_20b.yaml`.

        Raises:
            ValueError: The file is missing, not YAML, or has a key or type that is not a field's.
        """
        import jsonargparse

        if not Path(path).exists():
            raise ValueError(f"model config {path} does not exist; see configs/model/ for the shipped ones")
        check_yaml(read_text(path), path)
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls)
        try:
            namespace = parser.parse_path(str(path))
        except jsonargparse.ArgumentError as error:
            raise ValueError(f"model config {path}: {error}") from None
        return cls(**parser.instantiate_classes(namespace).as_dict())

    def to_dict(self) -> dict:
        """Return plain values only, safe to write as YAML or JSON; `from_dict` restores the configuration."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any, origin: object = "model config") -> ModelConfig:
        """Return the configuration that `to_dict` gave as values.

        Args:
            values: The values, perhaps from a file.
            origin: What messages call them.

        Raises:
            ValueError: A key is not a field, or a value is impossible.
        """
        config = convert(values, cls, origin, finite=True, remedy="use the version of gptoss_dist that wrote it")
        scaling = values.get("rope_scaling")
        for kind, given in ((cls, values), (RopeScaling, scaling or {})):
            unknown = sorted(set(given) - {f.name for f in dataclasses.fields(kind)})
            _require(not unknown, f"{origin} has unknown keys {printable(unknown)}")
        return config


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
