"""What goes out with a model's weights: tokenizer, chat template, generation settings and the model card.

From one published model to another in the same layout, files are copied. For the model of a run they are made from the
tokenizer of its data; a chat template and generation settings that came in with `init.from` are in its checkpoints, and
go out again. What has no place in the new folder is said.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from data_pipeline import Tokenizer
from data_pipeline.disk import write_synced
from data_pipeline.foreign import Count, convert, file_inside, read_bytes, read_json
from data_pipeline.tokenizer.harmony import chat_template, has_harmony
from data_pipeline.tokenizer.huggingface import huggingface_files
from gptoss_dist.checkpoint.formats import huggingface
from gptoss_dist.checkpoint.formats.checksums import FILE as CHECKSUMS
from gptoss_dist.checkpoint.formats.pretrained import Pretrained
from gptoss_dist.checkpoint.info import INFO, read_info

TEMPLATE, GENERATION, CARD = "chat_template.jinja", "generation_config.json", "README.md"
COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    GENERATION,
    "LICENSE*",
    "USAGE_POLICY*",
)
"""The files that are copied from one published model to another."""
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
PUBLISHED_IDS = {"eos_token_id": [200002, 199999, 200012], "pad_token_id": 199999}
"""Those of the published models, whose vocabulary no other has."""

MOST_BYTES = 256 << 20
"""The largest file of this kind; the published tokenizer.json has 28 MB."""

Message = Callable[[str], None]


def write_companions(pretrained: Pretrained, folder: Path, format: str, message: Message) -> Mapping[str, Any]:
    """Write the tokenizer, the chat template and the generation settings, as far as they are known.

    Args:
        pretrained: The model.
        folder: Where to write.
        format: That of `export`.
        message: Gets a line about what is left behind.

    Returns:
        The ids that begin, end and pad a text, for config.json.
    """
    if pretrained.format == "memory":
        return {}
    if pretrained.format == "run":
        return _write_those_of_a_run(pretrained, folder, format, message)
    if pretrained.format == format:
        for name in {path.name for pattern in COPIED for path in pretrained.folder.glob(pattern) if not path.is_dir()}:
            (folder / name).write_bytes(_companion(pretrained.folder, name))
        _name_what_is_left(pretrained, folder, message)
        values = huggingface.read_json(pretrained.folder / "config.json")
        return {key: values[key] for key in IDS if values.get(key) is not None}
    message(f"no tokenizer and no generation settings come from {pretrained.format}: add them to the folder by hand")
    _name_what_is_left(pretrained, folder, message)
    if pretrained.config.vocab_size != 201088 or format != "hf":
        return {}
    _write_json(folder / GENERATION, {"do_sample": True, **PUBLISHED_IDS})
    return PUBLISHED_IDS


def _write_those_of_a_run(pretrained: Pretrained, folder: Path, format: str, message: Message) -> Mapping[str, Any]:
    tokenizer = Tokenizer.load(pretrained.folder)
    tokenizer.save(folder)
    if format != "hf":
        message(f"format {format} has no place for a chat template and generation settings; format hf writes them")
        return {}
    files = huggingface_files(tokenizer, pretrained.config.max_position_embeddings)
    settings = files[GENERATION]
    if (pretrained.folder / GENERATION).is_file():
        try:
            carried_stop_ids(pretrained.folder, tokenizer.n_vocab)
        except UnknownStopIds as error:
            message(f"{GENERATION} of the weights that the run began with is left out: {error}")
        else:
            files[GENERATION] = settings | huggingface.read_json(pretrained.folder / GENERATION)
    for name, values in files.items():
        _write_json(folder / name, values)
    if (pretrained.folder / TEMPLATE).is_file():
        (folder / TEMPLATE).write_bytes(_companion(pretrained.folder, TEMPLATE))
        message(f"{TEMPLATE} is that of the weights which the run began with")
    elif has_harmony(tokenizer):
        write_synced(folder / TEMPLATE, chat_template())
    else:
        message(f"no chat template: tokenizer {tokenizer.name} lacks Harmony's special tokens")
    return {key: files[GENERATION][key] for key in IDS if key in files[GENERATION]}


class UnknownStopIds(ValueError):
    """Generation settings name ids that a tokenizer has not."""


def carried_stop_ids(folder: Path, n_vocab: int) -> list[int]:
    """Return the ids at which the generation settings beside a model end a text; none if there are no settings.

    Args:
        folder: That of the model.
        n_vocab: How many ids its tokenizer has.

    Raises:
        UnknownStopIds: One of them is none of the tokenizer's.
        ValueError: The file is damaged.
    """
    if not (folder / GENERATION).is_file():
        return []
    given = huggingface.read_json(folder / GENERATION).get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(i) is int and 0 <= i < n_vocab for i in ids):
        raise UnknownStopIds(f"eos_token_id={json.dumps(given)[:60]} is none of the tokenizer's {n_vocab} ids")
    return ids


def _companion(folder: Path, name: str) -> bytes:
    """Return the content of a file that goes with a model.

    Raises:
        ValueError: It leads out of the folder, is larger than such files are, or is called JSON and is not.
    """
    path = file_inside(folder, name)
    data = read_bytes(path, most=MOST_BYTES)
    if path.suffix == ".json":
        read_json(path, dict[str, Any], most=MOST_BYTES)
    return data


def companions_to_carry(folder: Path) -> dict[str, bytes]:
    """Return the files that a run keeps in its checkpoints, by name, of the model or checkpoint that it began with.

    Raises:
        ValueError: One of them is a link that leads out of the folder, or cannot be read.
    """
    names = [name for name in (TEMPLATE, GENERATION) if os.path.lexists(folder / name)]
    found = {name: _companion(folder, name) for name in names}
    settings = folder / "tokenizer_config.json"
    if TEMPLATE not in found and settings.is_file():
        template = huggingface.read_json(settings).get("chat_template")  # where transformers 4 kept it
        if isinstance(template, str):
            found[TEMPLATE] = template.encode()
    return found


def left_settings(pretrained: Pretrained, written: Mapping[str, Any]) -> list[str]:
    """Return `key=value` of the settings of a transformers model's config.json that a new one has not.

    Args:
        pretrained: The model.
        written: The new config.json.
    """
    if pretrained.format != "hf":
        return []
    ours = {
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "dtype",
        "torch_dtype",
        "tie_word_embeddings",
        "use_cache",
        "quantization_config",
        "transformers_version",
        "initial_context_length",
        "_name_or_path",
    }
    values = huggingface.read_json(pretrained.folder / "config.json")
    return [
        f"{key}={json.dumps(value)[:60]}"
        for key, value in values.items()
        if key not in ours and value is not None and written.get(key) != value
    ]


def _name_what_is_left(pretrained: Pretrained, folder: Path, message: Message) -> None:
    weights = ("*.safetensors", "*.safetensors.index.json", "config.json", "dtypes.json", CARD, CHECKSUMS, ".*")
    left = sorted(
        path.name + "/" * path.is_dir()
        for path in pretrained.folder.iterdir()
        if not (folder / path.name).exists() and not any(path.match(pattern) for pattern in weights)
    )
    if left:
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        message(f"left in {pretrained.folder}: {', '.join(left[:8])}{more}")


def write_card(
    pretrained: Pretrained, folder: Path, *, format: str, dtype: str, pack: bool, license: str | None
) -> str:
    """Write the model card.

    Args:
        pretrained: The model.
        folder: Where to write.
        format: That of `export`.
        dtype: The dtype of what is not packed.
        pack: Whether the experts are packed as MXFP4.
        license: The licence's name; by default that of the card of the model that came in, or "unknown".

    Returns:
        The licence.
    """
    license = license or _license_of(pretrained.folder / CARD) or "unknown"
    values = pretrained.config.to_dict()
    shown = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_local_experts",
        "num_experts_per_tok",
        "sliding_window",
        "max_position_embeddings",
        "tie_word_embeddings",
    )
    rows = [("parameters", f"{sum(_size(t.shape) for t in pretrained.tensors.values()):,}")]
    rows += [(key, str(values[key])) for key in shown]
    rows += [("weights", f"{dtype}, experts in MXFP4" if pack else dtype), *_history(pretrained)]
    loaded = {
        "hf": "It loads in transformers (`GptOssForCausalLM`).",
        "openai": "It has the layout of OpenAI's `original/`.",
        "safetensors": "It holds the bare weights, by the names of `gptoss_dist`.",
    }[format]
    library = "library_name: transformers\npipeline_tag: text-generation\n" if format == "hf" else ""
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    text = f"""---
license: {license}
{library}tags:
- gpt_oss
- gptoss_dist
---

# {_title(pretrained)}

A mixture-of-experts language model with the architecture of GPT-OSS, exported by gptoss_dist. {loaded}
`sha256sum --check {CHECKSUMS}` verifies its files.

| | |
|---|---|
{table}
"""
    write_synced(folder / CARD, text)
    return license


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _title(pretrained: Pretrained) -> str:
    if pretrained.format == "run":
        told = convert(read_info(pretrained.folder), _Told, pretrained.folder / INFO)
        return _plain(told.config.run.name or "model")
    return _plain(pretrained.folder.name or "model")


def _history(pretrained: Pretrained) -> list[tuple[str, str]]:
    """Return what a run says of its training: steps, tokens, and the names of its data without their paths."""
    if pretrained.format != "run":
        return []
    info = read_info(pretrained.folder)
    told = convert(info, _Told, pretrained.folder / INFO)
    rows = [("trained steps", f"{info['step']:,}")]
    if told.tokens is not None:
        rows.append(("trained tokens", f"{told.tokens:,}"))
    named = [f"{_plain(source.name)} (weight {source.weight})" for source in told.data.mixture.sources]
    if named:
        rows.append(("data", ", ".join(named)))
    if told.data.content_sha256:
        rows.append(("data SHA-256", _plain(told.data.content_sha256)))
    if told.config.train.precision:
        rows.append(("trained in", _plain(told.config.train.precision)))
    if told.config.init.begun:
        rows.append(("began with", _plain(Path(told.config.init.begun).name)))
    return rows


class _Source(msgspec.Struct):
    name: str
    weight: float | None = None


class _Mixture(msgspec.Struct):
    sources: list[_Source] = []


class _Data(msgspec.Struct):
    content_sha256: str | None = None
    mixture: _Mixture = msgspec.field(default_factory=_Mixture)


class _Train(msgspec.Struct):
    precision: str | None = None


class _Init(msgspec.Struct):
    begun: str | None = msgspec.field(default=None, name="from")


class _Run(msgspec.Struct):
    name: str = "model"


class _Config(msgspec.Struct):
    run: _Run = msgspec.field(default_factory=_Run)
    train: _Train = msgspec.field(default_factory=_Train)
    init: _Init = msgspec.field(default_factory=_Init)


class _Told(msgspec.Struct):
    """What a checkpoint says of the run that wrote it, as far as it says something."""

    tokens: Count | None = None
    data: _Data = msgspec.field(default_factory=_Data)
    config: _Config = msgspec.field(default_factory=_Config)


def _plain(text: object) -> str:
    """Return a name that cannot end its table cell or its line."""
    return re.sub(r"[|\x00-\x1f]+", " ", str(text))


def _license_of(card: Path) -> str | None:
    if not card.is_file():
        return None
    with open(card, encoding="utf-8", errors="replace") as file:
        head = re.match(r"---\n(.*?)\n---", file.read(10_000), re.DOTALL)
    found = re.search(r"^license:[ \t]*([\w.+-]+)[ \t]*$", head[1], re.MULTILINE) if head else None
    return found[1] if found else None


def _write_json(path: Path, values: dict) -> None:
    write_synced(path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")
