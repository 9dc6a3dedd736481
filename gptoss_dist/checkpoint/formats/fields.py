"""Where other tools keep the fields of `ModelConfig`: the one table, which everything that reads or writes theirs asks.

For example `num_local_experts` has that name in Hugging Face's configuration too, and is `num_experts` in OpenAI's;
`router_bias` is in neither, so that only a model whose value is GPT-OSS's own can be written for them.
"""

from __future__ import annotations

import typing
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import msgspec

from data_pipeline.foreign import Count, convert
from data_pipeline.printable import shortened
from gptoss_dist.model.config import ModelConfig


class Absent(Enum):
    """Why a format has no field for something."""

    CONVERTED = "the format says it in another way, which its module reads and writes"
    FIXED = "the format's tools always do what GPT-OSS does, which is the default of `ModelConfig`"
    UNUSED = "it says how weights are drawn, and nothing about those that there are"


CONVERTED, FIXED, UNUSED = Absent

FIELDS: dict[str, tuple[str | Absent, str | Absent]] = {
    # ModelConfig's         Hugging Face's             OpenAI's
    "vocab_size": ("vocab_size", "vocab_size"),
    "hidden_size": ("hidden_size", "hidden_size"),
    "intermediate_size": ("intermediate_size", "intermediate_size"),
    "num_hidden_layers": ("num_hidden_layers", "num_hidden_layers"),
    "num_attention_heads": ("num_attention_heads", "num_attention_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_key_value_heads"),
    "head_dim": ("head_dim", "head_dim"),
    "num_local_experts": ("num_local_experts", "num_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "experts_per_token"),
    "sliding_window": ("sliding_window", "sliding_window"),
    "layer_types": ("layer_types", CONVERTED),
    "max_position_embeddings": ("max_position_embeddings", CONVERTED),
    "rms_norm_eps": ("rms_norm_eps", FIXED),
    "rope_theta": (CONVERTED, "rope_theta"),
    "rope_scaling": (CONVERTED, CONVERTED),
    "initializer_range": ("initializer_range", UNUSED),
    "tie_word_embeddings": ("tie_word_embeddings", FIXED),
    "attention_bias": ("attention_bias", FIXED),
    "swiglu_alpha": ("swiglu_alpha", FIXED),
    "swiglu_limit": ("swiglu_limit", "swiglu_limit"),
    "router_bias": (FIXED, FIXED),
    "router_selection_bias": (FIXED, FIXED),
    "expert_bias": (FIXED, FIXED),
    "expert_activation": (FIXED, FIXED),
    "num_shared_experts": (FIXED, FIXED),
    "sink_init": (UNUSED, UNUSED),
    "sink_clamp": (FIXED, FIXED),
    "rope_pruned_fraction": (FIXED, FIXED),
}

_COLUMNS = {"hf": 0, "openai": 1}

SERVERS = {
    "layer_types": "sliding and full attention alternate",
    "rms_norm_eps": "vLLM has 1e-05",
    "swiglu_alpha": "they have 1.702",
    "swiglu_limit": "they have 7.0",
    "attention_bias": "they have biases",
}
"""The fields of Hugging Face's configuration that tools which serve models do not read (vLLM 0.32, llama.cpp), and what
these do instead. transformers reads all of them."""


def names(format: Literal["hf", "openai"]) -> dict[str, str]:
    """Return {field of `ModelConfig`: name in the format} of the fields that the format has with the same meaning."""
    column = _COLUMNS[format]
    return {field: name for field, places in FIELDS.items() if isinstance(name := places[column], str)}


def lost_fields(config: ModelConfig, format: Literal["hf", "openai"]) -> list[str]:
    """Return `field=value` of each field for which the format has no place and which is not GPT-OSS's own."""
    column, own = _COLUMNS[format], ModelConfig()
    values: dict[str, tuple[Any, Any]] = {
        field: (getattr(config, field), getattr(own, field))
        for field, places in FIELDS.items()
        if places[column] is FIXED
    }
    return [f"{field}={value}" for field, (value, default) in values.items() if value != default]


def fixed_by_servers(config: ModelConfig) -> list[str]:
    """Return a line about each field whose value vLLM or llama.cpp would silently replace by their own."""
    own = ModelConfig(num_hidden_layers=config.num_hidden_layers)
    return [
        f"transformers only: {field}={shortened(getattr(config, field))}, which vLLM or llama.cpp do not read "
        f"({theirs}): they would give wrong logits, or not load it"
        for field, theirs in SERVERS.items()
        if getattr(config, field) != getattr(own, field)
    ]


def check_types(values: dict[str, Any], format: Literal["hf", "openai"], path: Path) -> None:
    """Check that the fields of another tool's configuration are of the types that `ModelConfig` wants.

    Args:
        values: The contents of the file. Of Hugging Face's each may be null or missing.
        format: The format.
        path: The file, for the message.

    Raises:
        ValueError: A field is missing or of another type, or some number is not finite; one line that names it.
    """
    kinds = typing.get_type_hints(ModelConfig)
    if format == "hf":
        listed: list[Any] = [(name, kinds[field] | None, None) for field, name in names("hf").items()]
        rope = dict.fromkeys(("rope_scaling", "rope_parameters"), _Rope | None) | {"rope_theta": float | None}
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), Count | list[Count] | None)
        listed += [(name, kind, None) for name, kind in (rope | ids).items()]
    else:
        listed = [(name, kinds[field]) for field, name in names("openai").items()]
        numbers = ("rope_scaling_factor", "rope_ntk_alpha", "rope_ntk_beta")
        listed += [("initial_context_length", int), *((name, float) for name in numbers)]
    remedy = f"correct it to what a GPT-OSS model of {_MAKERS[format]} has"
    convert(values, msgspec.defstruct("Fields", listed, kw_only=True), path, finite=True, remedy=remedy)


def model_config(fields: dict[str, Any], path: Path) -> ModelConfig:
    """Return the architecture of these fields.

    Raises:
        ValueError: A value is impossible; the message names the file.
    """
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


_MAKERS = {"hf": "transformers", "openai": "OpenAI"}


class _Rope(msgspec.Struct):
    """What transformers says of the rotary embedding; in version 5 perhaps once for each type of layer."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool | None = None
    partial_rotary_factor: float | None = None
    sliding_attention: _Rope | None = None
    full_attention: _Rope | None = None
