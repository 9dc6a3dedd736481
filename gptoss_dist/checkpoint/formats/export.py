"""Writing models that other tools load. One process does it, a part of a tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Literal

import torch

from data_pipeline import Tokenizer
from data_pipeline.disk import publish, sync_path
from data_pipeline.tokenizer.huggingface import huggingface_files
from gptoss_dist.checkpoint.formats import huggingface, openai
from gptoss_dist.checkpoint.formats.pretrained import Pretrained
from gptoss_dist.checkpoint.formats.tensor_files import Held, LazyTensor, write_tensors
from gptoss_dist.checkpoint.formats.views import Losses, plain
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.transformer import GptOss
from gptoss_dist.ops.mxfp4 import GROUP

COMPANIONS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
              "chat_template*", "generation_config.json", "LICENSE*", "USAGE_POLICY*")  # fmt: skip
"""The files that are copied from one published model to another."""
PUBLISHED_IDS = {"eos_token_id": 200002, "pad_token_id": 199999}


def check_export(
    config: ModelConfig, format: Literal["hf", "openai", "safetensors"], pack: bool, search: bool = False
) -> None:
    """Refuse an export that cannot be.

    Args:
        config: The architecture of the model.
        format: That of `export`.
        pack: That of `export`.
        search: That of `export`.

    Raises:
        ValueError: The format cannot express the architecture, of which all fields that stand in the way are named, or
            the options do not go together.
    """
    if search and not pack:
        raise ValueError("search chooses the scales that pack writes, and pack is not asked for")
    if format == "safetensors":
        if pack:
            raise ValueError("pack needs format hf or openai; plain safetensors hold plain numbers")
        return
    wrong = {"hf": huggingface, "openai": openai}[format].inexpressible(config)
    if wrong:
        raise ValueError(
            f"format {format} cannot express this model: {', '.join(wrong)}; format safetensors writes the weights"
        )
    sizes = {key: getattr(config, key) for key in ("hidden_size", "intermediate_size")}
    odd = [f"{key}={value}" for key, value in sizes.items() if value % GROUP]
    if pack and odd:
        raise ValueError(f"pack (MXFP4) needs sizes in multiples of {GROUP}: {', '.join(odd)}")


def export(
    pretrained: Pretrained,
    folder: str | Path,
    format: Literal["hf", "openai", "safetensors"],
    *,
    dtype: torch.dtype = torch.bfloat16,
    pack: bool = False,
    search: bool = False,
    file_bytes: int = 5_000_000_000,
    message: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Write `pretrained` to the new folder `folder`, which appears only when it is complete.

    Args:
        pretrained: The model.
        folder: The folder to create.
        format: `hf` for transformers and vLLM, `openai` for OpenAI's own code, `safetensors` for the bare weights.
        dtype: The dtype of what is not packed.
        pack: Write the experts' weights in MXFP4.
        search: As in `ops.mxfp4.encode`.
        file_bytes: The largest size of a file, unless a single tensor is larger.
        message: Gets a line about each file, and about what is unusual.

    Returns:
        {tensor: relative quantisation error} of the packed ones.

    Raises:
        ValueError: The format cannot express the model, or the folder is there already.
        OSError: It cannot be written.
    """
    check_export(pretrained.config, format, pack, search)
    folder, losses = Path(folder), Losses()
    if folder.exists():
        raise ValueError(f"{folder} is there already; choose another folder")
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config, tensors = pretrained.config, pretrained.tensors
    if format == "safetensors":
        outputs = [plain(name, tensor, dtype) for name, tensor in tensors.items()]
        values = config.to_dict()
    elif format == "hf":
        outputs = huggingface.outputs(tensors, config, dtype=dtype, pack=pack, search=search, losses=losses)
    else:
        outputs = openai.outputs(tensors, config, dtype=dtype, pack=pack, search=search, losses=losses)
        values = openai.config_json(config)
    special_ids = _write_companions(pretrained, partial, format, message)
    if format == "hf":
        values = huggingface.config_json(config, dtype=dtype, pack=pack, special_ids=dict(special_ids))
    (partial / "config.json").write_text(json.dumps(values, indent=1) + "\n")
    for path in write_tensors(partial, outputs, file_bytes=file_bytes):
        message(f"wrote {path.name}")
    for path in partial.iterdir():
        sync_path(path)
    publish(partial, folder)
    return losses


def save_pretrained(
    model: GptOss, folder: str | Path, *, layout: Literal["hf", "openai", "safetensors"] = "hf", **options
) -> None:
    """Write a model that is in memory to the new folder `folder`.

    Args:
        model: The model.
        folder: The folder to create.
        layout: The `format` of `export`.
        **options: Further ones of `export`.

    Raises:
        ValueError: As `export`.
        OSError: As `export`.
    """
    tensors: dict[str, LazyTensor] = {
        name: Held(tensor) for name, tensor in chain(model.named_parameters(), model.named_buffers())
    }
    export(Pretrained("memory", Path(), model.config, tensors), folder, layout, **options)


def _write_companions(
    pretrained: Pretrained, folder: Path, format: str, message: Callable[[str], None]
) -> Mapping[str, int | list[int]]:
    """Write the tokenizer and the generation settings, as far as they are known.

    Returns:
        `eos_token_id` and `pad_token_id`, the ids that end and pad a text.
    """
    if pretrained.format == "memory":
        return {}
    if pretrained.format == "run":
        tokenizer = Tokenizer.load(pretrained.folder)
        tokenizer.save(folder)
        if format == "hf":
            for name, values in huggingface_files(tokenizer, pretrained.config.max_position_embeddings).items():
                (folder / name).write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n")
        return {"eos_token_id": tokenizer.eot_id, "pad_token_id": tokenizer.eot_id}
    if pretrained.format == format:
        for pattern in COMPANIONS:
            for path in pretrained.folder.glob(pattern):
                shutil.copyfile(path, folder / path.name)
        values = huggingface.read_json(pretrained.folder / "config.json")
        return {key: values[key] for key in ("eos_token_id", "pad_token_id") if values.get(key) is not None}
    message(f"no tokenizer and no generation settings come from {pretrained.format}: add them to {folder.stem} by hand")
    # Those of the published models, whose vocabulary no other has.
    return PUBLISHED_IDS if pretrained.config.vocab_size == 201088 else {}
