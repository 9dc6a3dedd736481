"""Writing models that other tools load. One process does it, a part of a tensor at a time."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data_pipeline.disk import publish, staging_directory, sync_path, write_synced
from gptoss_dist.checkpoint.formats import huggingface, openai
from gptoss_dist.checkpoint.formats.checksums import write_checksums
from gptoss_dist.checkpoint.formats.companions import left_settings, write_card, write_companions
from gptoss_dist.checkpoint.formats.fields import fixed_by_servers
from gptoss_dist.checkpoint.formats.pretrained import EMBEDDING, HEAD, Pretrained
from gptoss_dist.checkpoint.formats.tensor_files import Held, LazyTensor, Output, Slices, write_tensors
from gptoss_dist.checkpoint.formats.views import Losses, plain
from gptoss_dist.checkpoint.info import read_info
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.transformer import GptOss
from gptoss_dist.ops.mxfp4 import GROUP

Format = Literal["hf", "openai", "safetensors"]


def check_export(config: ModelConfig, format: Format, pack: bool, search: bool = False) -> None:
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
    wrong = {"hf": huggingface, "openai": openai}[format].inexpressible(_untied(config))
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
    format: Format,
    *,
    dtype: torch.dtype = torch.bfloat16,
    pack: bool = False,
    search: bool = False,
    file_bytes: int = 5_000_000_000,
    license: str | None = None,
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
        license: The licence that the model card names; by default that of the source's card, or "unknown".
        message: Gets a line about each file, about what is unusual, and about what is left behind.

    Returns:
        {tensor: relative quantisation error} of the packed ones.

    Raises:
        ValueError: The format cannot express the model, weights are not finite, or the folder is there already, or is
            being written by another process.
        OSError: It cannot be written.
    """
    check_export(pretrained.config, format, pack, search)
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} is there already; choose another folder")
    if pretrained.format == "run":
        message(f"{pretrained.folder}: step {read_info(pretrained.folder)['step']}")
    if format != "safetensors":
        pretrained = _with_head(pretrained, message)
    _report_readers(pretrained.config, format, pack, message)
    with staging_directory(folder.absolute()) as partial:
        losses = _write(pretrained, partial, format, dtype, pack, search, file_bytes, message)
        license = write_card(
            pretrained, partial, format=format, dtype=str(dtype).removeprefix("torch."), pack=pack, license=license
        )
        message(f"wrote README.md, the model card; licence: {license}")
        for path in partial.iterdir():
            sync_path(path)
        write_checksums(partial)
        try:
            publish(partial, folder.absolute())
        except OSError:
            if folder.exists():
                raise ValueError(f"{folder} was made by another process meanwhile; choose another folder") from None
            raise
    return losses


def _write(
    pretrained: Pretrained,
    partial: Path,
    format: Format,
    dtype: torch.dtype,
    pack: bool,
    search: bool,
    file_bytes: int,
    message: Callable[[str], None],
) -> Losses:
    """Write weights, configuration and what goes with them into the folder `partial`.

    Raises:
        ValueError: Weights are not finite.
    """
    losses, strange, config = Losses(), Counter[str](), pretrained.config
    tensors: dict[str, LazyTensor] = {
        name: _Watched(name, tensor, strange) for name, tensor in pretrained.tensors.items()
    }
    special_ids = write_companions(pretrained, partial, format, message)
    if format == "safetensors":
        outputs: list[Output] = [plain(name, tensor, dtype) for name, tensor in tensors.items()]
        values = config.to_dict()
    elif format == "hf":
        outputs = huggingface.outputs(tensors, config, dtype=dtype, pack=pack, search=search, losses=losses)
        values = huggingface.config_json(config, dtype=dtype, pack=pack, special_ids=dict(special_ids))
        if left := left_settings(pretrained, values):
            message(f"left out of config.json: {', '.join(left)}")
    else:
        outputs = openai.outputs(tensors, config, dtype=dtype, pack=pack, search=search, losses=losses)
        values = openai.config_json(config)
    write_synced(partial / "config.json", json.dumps(values, indent=1) + "\n")
    for path in write_tensors(partial, outputs, file_bytes=file_bytes):
        message(f"wrote {path.name}")
    if strange:
        more = f" and {len(strange) - 5} more tensors" if len(strange) > 5 else ""
        raise ValueError(
            f"{pretrained.folder} holds weights that are not finite: {', '.join(list(strange)[:5])}{more}; nothing is "
            "exported, choose an earlier checkpoint"
        )
    return losses


def save_pretrained(model: GptOss, folder: str | Path, *, layout: Format = "hf", **options) -> None:
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


class _Watched(LazyTensor):
    """A tensor of which each value that is read is checked to be finite."""

    def __init__(self, name: str, tensor: LazyTensor, strange: Counter[str]) -> None:
        self.name, self.tensor, self.strange = name, tensor, strange
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def read(self, slices: Slices) -> Tensor:
        """Read a part, and count its values that are not finite; they are read as 0, so that all of them are found."""
        values = self.tensor.read(slices)
        finite = torch.isfinite(values)
        if bad := int((~finite).sum()):
            self.strange[self.name] += bad
            return torch.where(finite, values, 0)
        return values


def _untied(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, tie_word_embeddings=False)


def _with_head(pretrained: Pretrained, message: Callable[[str], None]) -> Pretrained:
    """Return a tied model as one with a head of its own, which is equal: the tools that serve models know no other."""
    if not pretrained.config.tie_word_embeddings:
        return pretrained
    message(f"the embedding is written as {HEAD} too, and tie_word_embeddings as false: servers read no tied model")
    tensors = {**pretrained.tensors, HEAD: pretrained.tensors[EMBEDDING]}
    return pretrained._replace(config=_untied(pretrained.config), tensors=tensors)


def _report_readers(config: ModelConfig, format: Format, pack: bool, message: Callable[[str], None]) -> None:
    """Say which tools cannot read what is going to be written, where some can."""
    if format == "hf":
        for line in fixed_by_servers(config):
            message(line)
    if format == "openai" and not pack:
        message(
            "format openai without --mxfp4 is read by this project alone: OpenAI's code expects the experts in MXFP4"
        )
