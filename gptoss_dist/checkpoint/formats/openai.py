"""OpenAI's own format of GPT-OSS, that of the folder `original/` of the published models.

q, k and v are one projection; expert weights are [E, outputs, inputs], dense or as MXFP4 (`.blocks` and `.scales`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from gptoss_dist.checkpoint.formats.fields import check_types, lost_fields, model_config, names
from gptoss_dist.checkpoint.formats.huggingface import EXPERTS, checked, read_json
from gptoss_dist.checkpoint.formats.tensor_files import LazyTensor, Output, stored_tensors
from gptoss_dist.checkpoint.formats.views import Concatenated, Losses, Rows, Transposed, packed, plain
from gptoss_dist.model.config import ModelConfig, RopeScaling

TOP = {
    "model.embed_tokens.weight": "embedding.weight",
    "lm_head.weight": "unembedding.weight",
    "model.norm.weight": "norm.scale",
}
LAYER = {
    "input_layernorm.weight": "attn.norm.scale",
    "self_attn.sinks": "attn.sinks",
    "self_attn.o_proj.weight": "attn.out.weight",
    "self_attn.o_proj.bias": "attn.out.bias",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.experts.gate_up_proj": "mlp.mlp1_weight",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj": "mlp.mlp2_weight",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
}
"""The model's names within a layer, and OpenAI's within a block, without q, k and v."""
QKV = ("q_proj", "k_proj", "v_proj")


def read_config(folder: str | Path) -> ModelConfig:
    """Return the architecture that config.json describes.

    Raises:
        ValueError: The file is missing or damaged, or lacks a key.
    """
    path = Path(folder) / "config.json"
    values = read_json(path)
    check_types(values, "openai", path)
    fields = {ours: values[theirs] for ours, theirs in names("openai").items()}
    context, factor = values["initial_context_length"], float(values["rope_scaling_factor"])
    scaling = RopeScaling(
        factor=factor,
        original_max_position_embeddings=context,
        beta_slow=float(values["rope_ntk_alpha"]),
        beta_fast=float(values["rope_ntk_beta"]),
    )
    fields["rope_scaling"] = scaling if factor != 1 else None
    return model_config(fields | {"max_position_embeddings": int(context * factor)}, path)


def read_tensors(folder: str | Path, message: Callable[[str], None]) -> dict[str, LazyTensor]:
    """Return the folder's tensors by the model's names. Those that the model does not have keep their own.

    Args:
        folder: A folder that OpenAI has written.
        message: Gets a line about what is unusual.

    Raises:
        ValueError: As `huggingface.read_tensors`.
    """
    config, found = read_config(folder), stored_tensors(folder, message)
    result: dict[str, LazyTensor] = {}
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    borders = (0, heads, heads + kv_heads, heads + 2 * kv_heads)
    top = {theirs: ours for ours, theirs in TOP.items()}
    layer = {theirs: ours for ours, theirs in LAYER.items()}
    for name, tensor in found.items():
        block = re.fullmatch(r"block\.(\d+)\.(.+)", name)
        prefix, rest = (f"model.layers.{block[1]}.", block[2]) if block else ("", name)
        stem, _, form = rest.rpartition(".")
        if form == "scales":
            if name.removesuffix("scales") + "blocks" not in found:
                raise ValueError(f"{folder}: {name} has no blocks beside it")
        elif form == "blocks":
            scales = name.removesuffix("blocks") + "scales"
            if scales not in found:
                raise ValueError(f"{folder}: {name} has no {scales} beside it")
            result[prefix + layer.get(stem, stem)] = checked(tensor, found[scales], name, folder)
        elif stem == "attn.qkv":
            if tuple(tensor.shape[:1]) != borders[-1:]:
                raise ValueError(f"{folder}: {name} is {list(tensor.shape)}, config.json means {borders[-1]} rows")
            for projection, start, stop in zip(QKV, borders, borders[1:]):
                result[f"{prefix}self_attn.{projection}.{form}"] = Rows(tensor, start, stop)
        else:
            ours = (layer if block else top).get(rest, rest)
            if ours.endswith(EXPERTS) and len(tensor.shape) != 3:
                raise ValueError(f"{folder}: {name} is {list(tensor.shape)}, not [experts, outputs, inputs]")
            result[prefix + ours] = Transposed(tensor) if ours.endswith(EXPERTS) else tensor
    return result


def inexpressible(config: ModelConfig) -> list[str]:
    """Return the settings of the architecture for which this format has no place."""
    wrong = lost_fields(config, "openai")
    if config.layer_types != ModelConfig(num_hidden_layers=config.num_hidden_layers).layer_types:
        wrong.append("layer_types, which do not alternate from sliding attention on")
    if config.rope_scaling is not None and config.rope_scaling.truncate:
        wrong.append("rope_scaling.truncate=True")
    return wrong


def outputs(
    tensors: dict[str, LazyTensor], config: ModelConfig, *, dtype: torch.dtype, pack: bool, search: bool, losses: Losses
) -> list[Output]:
    """Return what to write of the model's `tensors`: with `pack` the experts in MXFP4, everything else in `dtype`."""
    made = [plain(theirs, tensors[ours], dtype) for ours, theirs in TOP.items()]
    for index in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{index}.", f"block.{index}."
        for form in ("weight", "bias"):
            parts = [tensors[f"{ours}self_attn.{projection}.{form}"] for projection in QKV]
            made.append(plain(f"{theirs}attn.qkv.{form}", Concatenated(parts), dtype))
        for name, other in LAYER.items():
            tensor, other = tensors[ours + name], theirs + other
            if not name.endswith(EXPERTS):
                made.append(plain(other, tensor, dtype))
            elif pack:
                made.append(packed(other + ".blocks", other + ".scales", Transposed(tensor), losses, search=search))
            else:
                made.append(plain(other, Transposed(tensor), dtype))
    return made


def config_json(config: ModelConfig) -> dict:
    """Return the contents of config.json."""
    scaling = config.rope_scaling or RopeScaling(factor=1.0)
    context = scaling.original_max_position_embeddings
    return {theirs: getattr(config, ours) for ours, theirs in names("openai").items()} | {
        "initial_context_length": context if config.rope_scaling else config.max_position_embeddings,
        "rope_scaling_factor": scaling.factor,
        "rope_ntk_alpha": scaling.beta_slow,
        "rope_ntk_beta": scaling.beta_fast,
    }
