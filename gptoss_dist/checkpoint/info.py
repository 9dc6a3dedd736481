"""`checkpoint.json`: what a checkpoint says about the run that wrote it.

The file is sealed: its last key is the SHA-256 of all others, so that a damaged file is never believed. `read_info`
returns the sealed values as they are. `CheckpointInfo` is the typed view of what a training run records in them, with
defaults for keys that earlier versions of this project did not write.

The format number changes when an older reader would misunderstand a newer file. A key that a reader may overlook can be
added without a new number, which is why unknown keys are ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INFO = "checkpoint.json"
FORMAT = 2
"""The number of the format that this version writes, and the only one that it reads."""


@dataclass(frozen=True)
class DataPlace:
    """The data of a run, and how far it has read them."""

    path: str | None
    """`data.path`; None where `data.sources` names the data."""
    content_sha256: str
    """Identity of the data's content, of all sources together."""
    versions: dict[str, int]
    """Version numbers of the code that decides which samples come when; a name that is missing has version 1."""
    mixture: dict[str, Any]
    """`MixtureDataset.state()`, and `start_step`, `history` and `read` as `TrainingData.place` adds them."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a training run records with its tensors. The fields are keys of `checkpoint.json`."""

    step: int
    """Optimizer steps done."""
    samples_consumed: int
    """Samples read by all ranks together: the place in the order of the data."""
    config: dict[str, Any]
    """The whole configuration of the run, as `Config.to_dict` gives it."""
    data: DataPlace
    tokens: int
    """Tokens trained on."""
    skipped_steps: int = 0
    """Steps whose gradients were not finite, so that no weight changed."""
    validation_loss: float | None = None
    """Loss of a validation right before the save, or None."""
    mlflow_run_id: str | None = None
    code: str | None = None
    """The revision of the code."""
    layout: str | None = None
    """The engine and its device layout, in words."""
    world_size: int | None = None
    """Number of ranks that wrote it. `read` fills this field and the next two; the store writes them."""
    torch: str | None = None
    """The version of torch that wrote it."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`bytes` and `sha256` of every other file of the checkpoint, by name."""

    @classmethod
    def read(cls, checkpoint: str | Path) -> CheckpointInfo:
        """Read the `checkpoint.json` of a checkpoint directory.

        Raises:
            ValueError: As `read_info`, or a key that every training run writes is missing.
        """
        values = read_info(checkpoint)
        try:
            data = values["data"]
            mixture = data["mixture"] if "mixture" in data else _single_source(values)
            place = DataPlace(data.get("path"), data["content_sha256"], data.get("versions", {}), mixture)
            tokens = values.get("tokens", values["samples_consumed"] * values["config"]["data"]["seq_len"])
            required = {key: values[key] for key in ("step", "samples_consumed", "config")}
        except KeyError as error:
            raise ValueError(f"{Path(checkpoint) / INFO} lacks {error}: no training run wrote it") from None
        optional = {f.name for f in dataclasses.fields(cls)} - {*required, "data", "tokens"}
        given = {key: values[key] for key in optional if key in values}
        return cls(**required, data=place, tokens=tokens, **given)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON values to hand to `Saver.save`, which adds `format`, `world_size`, `torch` and `files`."""
        values = dataclasses.asdict(self)
        for key in ("world_size", "torch", "files"):
            del values[key]
        return values


def _single_source(values: dict[str, Any]) -> dict[str, Any]:
    """Return the mixture of a checkpoint from before there were mixtures, whose data are one source."""
    sha, name = values["data"]["content_sha256"], Path(values["data"]["path"]).name
    only = {"name": name, "content_sha256": sha, "weight": 1.0, "max_epochs": None}
    read = {sha: values["samples_consumed"]}
    return {"start": 0, "start_step": 0, "consumed": {}, "sources": [only], "stages": [], "read": read, "history": []}


def read_info(checkpoint: str | Path) -> dict[str, Any]:
    """Return the JSON values stored with a checkpoint, without their seal.

    Raises:
        ValueError: It is not a checkpoint, of another format, or not what was written.
    """
    path = Path(checkpoint) / INFO
    if not path.is_file():
        raise ValueError(f"{INFO} is missing: it was not finished")
    try:
        values = json.loads(path.read_text())
        recorded = values.pop("sha256", None)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from None
    if (number := values.get("format")) != FORMAT:
        newer = isinstance(number, int) and number > FORMAT
        remedy = (
            "update gptoss_dist to a version that does" if newer else "use the version of gptoss_dist that wrote it"
        )
        raise ValueError(f"{path} has format {number}, this version reads {FORMAT}; {remedy}")
    if recorded != _digest(values):
        raise ValueError(f"{path} is not what was written (SHA-256)")
    return values


def sealed(values: dict[str, Any]) -> str:
    """Return the text of a `checkpoint.json` that holds `values` and their seal."""
    return json.dumps({**values, "sha256": _digest(values)}, indent=1)


def _digest(values: dict[str, Any]) -> str:
    as_read = json.loads(json.dumps(values))  # JSON turns every key into a string, and tuples into lists
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()
