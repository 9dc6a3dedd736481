"""Weights from outside of a run: those of published models, and of the checkpoints of other runs.

Each rank reads what it holds of each tensor, a part at a time: no rank ever needs a whole tensor.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from data_pipeline.foreign import check_folder
from gptoss_dist.checkpoint.formats import huggingface, openai
from gptoss_dist.checkpoint.formats.checksums import FILE as CHECKSUMS
from gptoss_dist.checkpoint.formats.checksums import altered_files, has_checksums
from gptoss_dist.checkpoint.formats.headers import check_sizes
from gptoss_dist.checkpoint.formats.tensor_files import LazyTensor, stored_tensors
from gptoss_dist.checkpoint.info import INFO, read_model
from gptoss_dist.checkpoint.store import candidates, misfits, resolve
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.transformer import GptOss

log = logging.getLogger(__name__)

FORMATS = {"hf": huggingface, "openai": openai}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Pretrained(NamedTuple):
    """Weights that can be read in parts."""

    format: str
    """It is `hf`, `openai`, `run` for a training checkpoint, or `memory`."""
    folder: Path
    config: ModelConfig
    tensors: dict[str, LazyTensor]
    """The tensors by the model's names."""

    def build(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> GptOss:
        """Return a model with these weights, ready for inference.

        Raises:
            ValueError: As `load_into`.
        """
        with torch.device("meta"):
            model = GptOss(self.config)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.to_empty(device=device)
        model.tie()
        load_into(dict(chain(model.named_parameters(), model.named_buffers())), self)
        return model.eval()


def open_pretrained(
    where: str | Path, *, message: Callable[[str], None] = log.warning, verify: bool = True
) -> Pretrained:
    """Open the weights that `where` names, without reading them yet.

    Args:
        where: `hf:FOLDER`, `openai:FOLDER`, or the folder of a run, of its checkpoints, or a checkpoint. Without `hf:`
            or `openai:` the config.json of a folder tells which of the two it is.
        message: Gets a line about what is unusual.
        verify: Hash the files first of what carries checksums. Of training checkpoints the newest intact one is taken;
            otherwise the newest.

    Raises:
        ValueError: There is nothing of that kind, or it is damaged.
    """
    format, _, folder = str(where).partition(":")
    if (Path(where) / "config.json").is_file() and not (Path(where) / INFO).is_file():
        format = "hf" if "model_type" in huggingface.read_json(Path(where) / "config.json") else "openai"
        folder = str(where)
    if format in FORMATS and folder:
        if not Path(folder).is_dir():
            raise ValueError(f"{where}: there is no folder {folder}")
        check_folder(folder)
        _refuse_adapter(Path(folder))
        if verify and has_checksums(folder):
            _refuse_altered(Path(folder), message)
        module = FORMATS[format]
        config, tensors = module.read_config(folder), module.read_tensors(folder, message)
        if config.tie_word_embeddings and HEAD in tensors:
            if not _equal(tensors[HEAD], tensors.get(EMBEDDING)):
                raise ValueError(
                    f"{folder}: {HEAD} is not equal to {EMBEDDING}, though config.json says tie_word_embeddings; set "
                    "that to false there, or take the tensor out"
                )
            del tensors[HEAD]
        check_sizes(config, {name: tensor.shape for name, tensor in tensors.items()}, Path(folder) / "config.json")
        return Pretrained(format, Path(folder), config, tensors)
    if re.fullmatch(r"[a-z]{2,}", format) and folder:
        raise ValueError(f"{where}: {format} is no known format; use {', '.join(f'{name}:FOLDER' for name in FORMATS)}")
    _refuse_adapter(Path(where))
    checkpoint = resolve(where, message) if verify else candidates(where)[-1]
    check_folder(checkpoint)
    config = read_model(checkpoint)
    stored: dict[str, LazyTensor] = {
        n.removeprefix("model."): t for n, t in stored_tensors(checkpoint).items() if n.startswith("model.")
    }
    check_sizes(config, {name: tensor.shape for name, tensor in stored.items()}, checkpoint / INFO)
    return Pretrained("run", checkpoint, config, stored)


def check_architecture(pretrained: Pretrained, config: ModelConfig) -> Pretrained:
    """Refuse weights of another architecture than `config`.

    Returns:
        The weights; for a tied model without the head, if that is equal to the embedding, as in an export of one.

    Raises:
        ValueError: A line that names every field that differs.
    """
    tensors = pretrained.tensors
    if config.tie_word_embeddings and HEAD in tensors and _equal(tensors[HEAD], tensors.get(EMBEDDING)):
        tied = dataclasses.replace(pretrained.config, tie_word_embeddings=True)
        pretrained = pretrained._replace(config=tied, tensors={n: t for n, t in tensors.items() if n != HEAD})
    ours, theirs = _computed(config), _computed(pretrained.config)
    differ = [f"{key} ({theirs[key]} there, {ours[key]} here)" for key in ours if ours[key] != theirs[key]]
    if differ:
        raise ValueError(f"{pretrained.folder} does not fit the model: {', '.join(differ)}; change --model")
    return pretrained


def _computed(config: ModelConfig) -> dict[str, Any]:
    """Return the fields that decide what the model computes from given weights."""
    values = config.to_dict()
    # How weights are drawn says nothing of those that are read, nor does a limit of length.
    for key in ("initializer_range", "sink_init", "max_position_embeddings"):
        del values[key]
    if config.rope_scaling is not None and config.rope_scaling.factor == 1:
        values["rope_scaling"] = None  # the same function
    return values


def _equal(one: LazyTensor, other: LazyTensor | None) -> bool:
    if other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return all(torch.equal(values, other.read(part)) for part, values in one.parts())


def _refuse_adapter(folder: Path) -> None:
    """Refuse a folder that holds what was trained beside a model instead of a model."""
    if not (folder / "adapter_config.json").is_file() or list(folder.glob("model*.safetensors")):
        return
    settings = huggingface.read_json(folder / "adapter_config.json")
    raise ValueError(
        f"{folder} holds an adapter ({settings.get('peft_type', 'LoRA')} for "
        f"{settings.get('base_model_name_or_path')}), not a model; merge it with PEFT (merge_and_unload, "
        "save_pretrained) and give the folder of that"
    )


def _refuse_altered(folder: Path, message: Callable[[str], None]) -> None:
    """Refuse a model of which a file that is read is not what was exported; collective where there are ranks."""
    problems = altered_files(folder)
    read = [p for p in problems if p.split()[0].startswith("config.json") or ".safetensors" in p.split()[0]]
    for problem in problems:
        if problem not in read:
            message(f"{folder}: {problem}")
    if read:
        raise ValueError(
            f"{folder} is not what was exported: {'; '.join(read[:3])}{'; ...' * (len(read) > 3)}; take another copy, "
            f"or if you changed it yourself, delete {CHECKSUMS} there"
        )


def load_into(weights: dict[str, Tensor], pretrained: Pretrained) -> None:
    """Fill the tensors of `weights` in place, each rank its own part of them; collective where there are ranks.

    Args:
        weights: Plain tensors, DTensors, or what else torch DCP can fill, by the model's names.
        pretrained: What they are filled from.

    Raises:
        ValueError: Names or shapes differ, or a file is damaged; all of them are listed.
    """
    shapes = {name: tensor.shape for name, tensor in pretrained.tensors.items()}
    if problems := misfits(weights, shapes):
        raise ValueError(f"{pretrained.folder} does not fit the model: " + "; ".join(problems))
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is meant
        try:
            dcp.load(weights, storage_reader=_Reader(pretrained.tensors), no_dist=alone)
        except dcp.CheckpointException as error:
            raise ValueError("; ".join(sorted({str(reason) for reason, _ in error.failures.values()}))) from None


class _Reader(StorageReader):
    """A reader that hands lazy tensors to DCP, which knows what each rank holds."""

    def __init__(self, tensors: dict[str, LazyTensor]) -> None:
        self.tensors = tensors

    def reset(self, checkpoint_id=None) -> None:
        """There is nothing to reset."""

    def read_metadata(self, *_, **__) -> Metadata:
        entries: dict[str, Any] = {}
        places = {}
        for name, tensor in self.tensors.items():
            start, shape = torch.Size([0] * len(tensor.shape)), torch.Size(tensor.shape)
            whole = ChunkStorageMetadata(offsets=start, sizes=shape)
            entries[name] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), shape, [whole])
            places[MetadataIndex(name, start)] = name
        return Metadata(state_dict_metadata=entries, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_, **__) -> None:
        """There is nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            offset = item.storage_offsets
            slices = tuple(slice(o, o + n) for o, n in zip(offset, item.lengths))
            target = planner.resolve_tensor(item).detach()
            for part, values in self.tensors[item.storage_index.fqn].parts(slices):
                target[tuple(slice(s.start - o, s.stop - o) for s, o in zip(part, offset))].copy_(values)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True


def load_pretrained(
    where: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> GptOss:
    """Return a model with its weights, ready for inference.

    Args:
        where: As for `open_pretrained`.

    Raises:
        ValueError: There is no such model, or it is damaged.
    """
    return open_pretrained(where).build(dtype, device)
