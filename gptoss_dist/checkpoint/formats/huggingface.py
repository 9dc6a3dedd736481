"""Hugging Face's format of GPT-OSS: what `transformers.GptOssForCausalLM` saves and loads.

Names and shapes are the model's own. In the published form the experts' weights are MXFP4: `gate_up_proj_blocks` and
`gate_up_proj_scales` stand for `gate_up_proj`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_pipeline import foreign
from data_pipeline.printable import printable
from gptoss_dist.checkpoint.formats.fields import check_types, lost_fields, model_config, names
from gptoss_dist.checkpoint.formats.tensor_files import LazyTensor, Output, stored_tensors
from gptoss_dist.checkpoint.formats.views import Losses, Packed, Transposed, packed, plain
from gptoss_dist.model.config import ModelConfig, RopeScaling

BLOCKS, SCALES = "_blocks", "_scales"
EXPERTS = ("gate_up_proj", "down_proj")
"""How the names of the weights end that are packed as MXFP4."""


def read_config(folder: str | Path) -> ModelConfig:
    """Return the architecture that config.json describes.

    Raises:
        ValueError: The file is missing or damaged, or not that of a GPT-OSS model.
    """
    path = Path(folder) / "config.json"
    values = read_json(path)
    if values.get("model_type") != "gpt_oss":
        raise ValueError(f"{path}: model_type={printable(values.get('model_type'))[:60]} is not gpt_oss")
    check_types(values, "hf", path)
    for key, only in (("hidden_act", "silu"), ("attention_dropout", 0)):
        if values.get(key, only) != only:
            raise ValueError(f"{path}: {key}={printable(values[key])[:60]} is not supported; GPT-OSS has {only}")
    fields = {key: values[key] for key in names("hf") if values.get(key) is not None}
    fields |= _rope_fields(path, values)
    return model_config(fields, path)


def _rope_fields(path: Path, values: dict) -> dict:
    """Return `rope_theta` and `rope_scaling`, as far as config.json says something of them.

    transformers 4 has a field `rope_theta` and a mapping `rope_scaling`, transformers 5 has both in one mapping
    `rope_parameters`, which may hold a mapping for each type of layer instead. A file may have several of these forms.

    Args:
        path: The file, for messages.
        values: The whole config.json.
    """
    found: dict[str, dict] = {}
    for name in ("rope_scaling", "rope_parameters"):
        for place, rope in _by_layer_type(name, values.get(name) or {}).items():
            theta = rope.pop("rope_theta", values.get("rope_theta"))
            scaling = _rope_scaling(path, place, rope, values)
            found[place] = {"rope_scaling": scaling} | ({} if theta is None else {"rope_theta": float(theta)})
    if not found:
        # In transformers 4 null says that there is none; transformers 5 takes an empty mapping for GPT-OSS's own.
        if "rope_parameters" in values or values.get("rope_scaling") is not None:
            raise ValueError(
                f"{path}: rope_parameters or rope_scaling is empty; give rope_type default or yarn, or leave both out, "
                "which means GPT-OSS's own YaRN"
            )
        theta = values.get("rope_theta")
        fields = {} if theta is None else {"rope_theta": float(theta)}
        return fields | ({"rope_scaling": None} if "rope_scaling" in values else {})
    (first, fields), *others = found.items()
    for place, other in others:
        if any(fields[key] != other[key] for key in fields.keys() & other.keys()):
            raise ValueError(
                f"{path}: {first} and {place} differ, and a GPT-OSS model has one rotary embedding for all layers; "
                "leave out the wrong one"
            )
        fields |= other
    return fields


def _by_layer_type(name: str, rope: dict) -> dict[str, dict]:
    """Return {place: mapping} of a mapping that is for all layers, or of those for each type of layer in it."""

    def said(mapping: dict) -> dict:
        if "truncate" in mapping:  # transformers takes null for false there, not for its default
            mapping = mapping | {"truncate": bool(mapping["truncate"])}
        return {key: value for key, value in mapping.items() if value is not None and not isinstance(value, dict)}

    common, nested = said(rope), {key: value for key, value in rope.items() if isinstance(value, dict)}
    if not nested:
        return {name: common} if common else {}
    return {f"{name}.{key}": common | said(inner) for key, inner in nested.items()}


def _rope_scaling(path: Path, place: str, rope: dict, values: dict) -> RopeScaling | None:
    """Return the scaling that `rope` describes.

    What is missing gets the defaults of transformers, which are not GPT-OSS's own. YaRN with factor 1 is no scaling.

    Args:
        path: The file, for messages.
        place: Where it stands in the file, for messages.
        rope: The mapping without theta.
        values: The whole config.json.
    """
    named = [rope.pop(key) for key in ("rope_type", "type") if key in rope]
    kind = named[0] if named else "default"
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    if kind == "default":
        if rope:
            what = "has rope_type default" if named else "has no rope_type"
            raise ValueError(
                f"{path}: {place} {what} but says {', '.join(f'{k}={v}' for k, v in rope.items())}; give rope_type "
                "yarn, or leave these out"
            )
        return None
    known = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"}
    if kind != "yarn" or (unknown := sorted(rope.keys() - known)):
        wrong = f"rope_type={printable(kind)[:60]}" if kind != "yarn" else f"{unknown} of the rotary embedding"
        raise ValueError(f"{path}: {wrong} is not supported; use yarn with {', '.join(sorted(known))}, or default")
    if "factor" not in rope:
        raise ValueError(f"{path}: yarn needs a factor")
    if rope["factor"] == 1:
        return None
    longest = values.get("max_position_embeddings", ModelConfig().max_position_embeddings)
    try:
        return RopeScaling(**{"original_max_position_embeddings": longest, "truncate": True, **rope})
    except ValueError as error:
        raise ValueError(f"{path}: {place}: {error}") from None


def read_json(path: Path) -> dict:
    """Return the object that a JSON file holds.

    Raises:
        ValueError: The file is missing or damaged, or holds something else.
    """
    return foreign.read_json(foreign.file_inside(path.parent, path.name), dict[str, Any])


def read_tensors(folder: str | Path, message: Callable[[str], None]) -> dict[str, LazyTensor]:
    """Return the folder's tensors by the model's names. MXFP4 is unpacked as it is read.

    Args:
        folder: A folder that transformers or OpenAI has written.
        message: Gets a line about what is unusual.

    Raises:
        ValueError: There are none, files are damaged, or MXFP4 blocks and scales do not fit each other.
    """
    found, dense = stored_tensors(folder, message), []
    result: dict[str, LazyTensor] = {}
    for name, tensor in found.items():
        stem = name.removesuffix(BLOCKS)
        if name.endswith(SCALES):
            if name.removesuffix(SCALES) + BLOCKS not in found:
                raise ValueError(f"{folder}: {name} has no {name.removesuffix(SCALES) + BLOCKS} beside it")
        elif stem == name:
            result[name] = tensor
        elif stem + SCALES in found:
            result[stem] = checked(tensor, found[stem + SCALES], name, folder)
        elif tensor.dtype.is_floating_point:
            dense.append(name)  # what transformers 5.23 saves of an MXFP4 model that it has unpacked
            result[stem] = tensor
        else:
            raise ValueError(f"{folder}: {name} has no {stem + SCALES} beside it")
    if dense:
        message(f"{folder}: {len(dense)} tensors named *{BLOCKS} hold plain numbers and are read so")
    return result


def checked(blocks: LazyTensor, scales: LazyTensor, name: str, folder: str | Path) -> Packed:
    """Return MXFP4 blocks and their scales as one tensor.

    Args:
        blocks: The blocks.
        scales: The scales.
        name: The name of the blocks, for messages.
        folder: The folder that they are in, for messages.

    Raises:
        ValueError: They do not fit each other.
    """
    if (
        {blocks.dtype, scales.dtype} != {torch.uint8}
        or len(scales.shape) != 3
        or tuple(blocks.shape) != (*scales.shape, 16)
    ):
        raise ValueError(
            f"{folder}: {name} {tuple(blocks.shape)} and its scales {tuple(scales.shape)} are not MXFP4: uint8 "
            "[experts, outputs, groups, 16] and [experts, outputs, groups] are"
        )
    return Packed(blocks, scales)


def inexpressible(config: ModelConfig) -> list[str]:
    """Return the settings of the architecture for which this format has no place."""
    return lost_fields(config, "hf")


def outputs(
    tensors: dict[str, LazyTensor], config: ModelConfig, *, dtype: torch.dtype, pack: bool, search: bool, losses: Losses
) -> list[Output]:
    """Return what to write of the model's `tensors`: with `pack` the experts in MXFP4, everything else in `dtype`."""
    made = []
    for name, tensor in tensors.items():
        if pack and name.endswith(EXPERTS):
            made.append(packed(name + BLOCKS, name + SCALES, Transposed(tensor), losses, search=search))
        else:
            made.append(plain(name, tensor, dtype))
    return made


def config_json(config: ModelConfig, *, dtype: torch.dtype, pack: bool, special_ids: dict | None = None) -> dict:
    """Return the contents of config.json, as transformers reads them.

    Args:
        config: The architecture.
        dtype: The dtype of what is not packed.
        pack: Whether the experts are packed as MXFP4.
        special_ids: `eos_token_id`, which may be a list, and `pad_token_id`.
    """
    rope = dict(vars(config.rope_scaling or _no_scaling(config)))
    name = str(dtype).removeprefix("torch.")
    values = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **{key: getattr(config, key) for key in names("hf")},
        "attention_dropout": 0.0,
        "dtype": name,
        "torch_dtype": name,  # as transformers 4 and tools of its time call it
        "hidden_act": "silu",
        "output_router_logits": False,
        # The same twice: as transformers 4 and vLLM read it, and as transformers 5 does.
        "rope_scaling": rope,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "use_cache": True,
        **(special_ids or {}),
    }
    if pack:
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    return values


def _no_scaling(config: ModelConfig) -> RopeScaling:
    """Return YaRN that scales nothing. vLLM does not read a GPT-OSS model without YaRN.

    With these betas each pair is taken from the table that is not interpolated, alone: a sum of shares of both tables,
    though these are equal, would be rounded.
    """
    length = config.max_position_embeddings
    return RopeScaling(
        factor=1.0, original_max_position_embeddings=length, beta_fast=float(length), beta_slow=float(length)
    )
