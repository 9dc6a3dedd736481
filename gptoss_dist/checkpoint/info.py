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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import msgspec

from data_pipeline.foreign import Count, convert, read_json
from data_pipeline.printable import printable
from gptoss_dist.model.config import ModelConfig

INFO = "checkpoint.json"
FORMAT = 2
"""The number of the format that this version writes, and the only one that it reads."""
_REMEDY = "no training run wrote it so; restore the checkpoint from a good copy, or take another one"


class SourceState(TypedDict):
    """A source of a mixture, as `MixtureDataset.state` describes it."""

    name: str
    content_sha256: str
    weight: float | None
    max_epochs: float | None


class StageState(TypedDict):
    """A change of weights in a mixture."""

    position: int
    weights: dict[str, float]


class MixtureState(TypedDict):
    """`MixtureDataset.state()`, and `start_step`, `history` and `read` as `TrainingData.place` adds them."""

    start: Count
    start_step: Count
    consumed: dict[str, Count]
    sources: list[SourceState]
    stages: list[StageState]
    read: dict[str, Count]
    history: list[dict[str, Any]]


class SkippedSamples(TypedDict):
    """Positions of a data order that the run passes over, because the loss rose when it had read them."""

    first: Count
    """The first position."""
    end: Count
    """The one after the last."""
    order: str
    """Which order the positions are of, as `order_id` gives it."""
    step: Count
    """The first step whose loss was high."""
    rewound_to: Count
    """The step that the run went back to."""
    reason: str
    """What was seen, in words."""


class StoredFile(msgspec.Struct):
    """What `checkpoint.json` says of another file of the checkpoint."""

    bytes: Count
    sha256: str


class _Stored(msgspec.Struct):
    """The keys that the store writes, whatever it is given."""

    step: Count
    files: dict[str, StoredFile] = {}


class _Data(msgspec.Struct):
    """The key `data` in all versions of it."""

    content_sha256: str
    path: str | None = None
    versions: dict[str, int] = {}
    skipped: list[SkippedSamples] = []
    mixture: MixtureState | msgspec.UnsetType = msgspec.UNSET


class _Run(msgspec.Struct):
    """What every training run writes, in all versions."""

    step: Count
    samples_consumed: Count
    config: dict[str, Any]
    data: _Data


class _DataSettings(msgspec.Struct):
    seq_len: Count


class _Settings(msgspec.Struct):
    data: _DataSettings


class _SampleLength(msgspec.Struct):
    """Where the length of a sample is, which older versions did not multiply."""

    config: _Settings


StepLoss = tuple[Count, float | None, Count]
"""A step, its loss in nats (None if that was not finite), and the place in the order of the data after it."""


@dataclass(frozen=True)
class DataPlace:
    """The data of a run, and how far it has read them."""

    path: str | None
    """`data.path`; None where `data.sources` names the data."""
    content_sha256: str
    """Identity of the data's content, of all sources together."""
    versions: dict[str, int]
    """Version numbers of the code that decides which samples come when; a name that is missing has version 1."""
    mixture: MixtureState
    skipped: list[SkippedSamples] = field(default_factory=list)
    """What the run skips. A reader that overlooks it reads these samples, if they are still to come, and all others as
    they are."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a training run records with its tensors. The fields are keys of `checkpoint.json`."""

    step: Count
    """Optimizer steps done."""
    samples_consumed: Count
    """The place in the order of the data: all samples before it were read by all ranks together, or skipped."""
    config: dict[str, Any]
    """The whole configuration of the run, as `Config.to_dict` gives it."""
    data: DataPlace
    tokens: Count
    """Tokens trained on."""
    skipped_steps: Count = 0
    """Steps whose gradients were not finite, so that no weight changed."""
    validation_loss: float | None = None
    """Loss of a validation right before the save, or None."""
    recent_losses: list[StepLoss] = field(default_factory=list)
    """The steps that the next one's loss is compared with, if the run looks for spikes."""
    mlflow_run_id: str | None = None
    code: str | None = None
    """The revision of the code."""
    layout: str | None = None
    """The engine and its device layout, in words."""
    world_size: Count | None = None
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
        values, origin = read_info(checkpoint), Path(checkpoint) / INFO
        run = convert(values, _Run, origin, remedy=_REMEDY)
        if "tokens" not in values:
            seq_len = convert(values, _SampleLength, origin, remedy=_REMEDY).config.data.seq_len
            values["tokens"] = run.samples_consumed * seq_len
        mixture = _single_source(run, origin) if run.data.mixture is msgspec.UNSET else run.data.mixture
        for stage in mixture["stages"]:
            if unknown := stage["weights"].keys() - {source["name"] for source in mixture["sources"]}:
                raise ValueError(f"{origin}: data.mixture.stages name {printable(min(unknown))}, no source; {_REMEDY}")
        check_skipped(run.data.skipped, origin, remedy=_REMEDY)
        place = {"path": run.data.path, "content_sha256": run.data.content_sha256, "versions": run.data.versions}
        known = {"mixture": mixture, "skipped": run.data.skipped}
        return convert(values | {"data": place | known}, cls, origin, remedy=_REMEDY)

    @property
    def model(self) -> ModelConfig:
        """The architecture that the run trains.

        Raises:
            ValueError: The configuration has none, or an impossible one.
        """
        return ModelConfig.from_dict(self.config.get("model"), f"{INFO}: config.model")

    def to_json(self) -> dict[str, Any]:
        """Return the JSON values to hand to `Saver.save`, which adds `format`, `world_size`, `torch` and `files`."""
        values = dataclasses.asdict(self)
        for key in ("world_size", "torch", "files"):
            del values[key]
        return values


def check_skipped(skipped: Sequence[SkippedSamples], origin: Path, *, remedy: str) -> None:
    """Raise ValueError, with the file `origin` and the remedy, if what is said to be skipped is no range."""
    for entry in skipped:
        if entry["first"] >= entry["end"]:
            raise ValueError(f"{origin}: skipped: {entry['first']} to {entry['end']} is no range of samples; {remedy}")


def _single_source(run: _Run, origin: Path) -> MixtureState:
    """Return the mixture of a checkpoint from before there were mixtures, whose data are one source."""
    if run.data.path is None:
        raise ValueError(f"{origin}: data.path is missing; {_REMEDY}")
    sha, name = run.data.content_sha256, Path(run.data.path).name
    only = SourceState(name=name, content_sha256=sha, weight=1.0, max_epochs=None)
    read = {sha: run.samples_consumed}
    return {"start": 0, "start_step": 0, "consumed": {}, "sources": [only], "stages": [], "read": read, "history": []}


def read_info(checkpoint: str | Path) -> dict[str, Any]:
    """Return the JSON values stored with a checkpoint, without their seal.

    Raises:
        ValueError: It is not a checkpoint, of another format, not what was written, or names files outside of its
            folder; one line.
    """
    path = Path(checkpoint) / INFO
    if not path.is_file():
        raise ValueError(f"{INFO} is missing: it was not finished")
    values = read_json(path, dict[str, Any], remedy=_REMEDY)
    intact = is_sealed(values)
    values.pop("sha256", None)
    if (number := values.get("format")) != FORMAT:
        newer = isinstance(number, int) and number > FORMAT
        remedy = (
            "update gptoss_dist to a version that does" if newer else "use the version of gptoss_dist that wrote it"
        )
        shown = printable(str(number)[:20])
        raise ValueError(f"{printable(path)} has format {shown}, this version reads {FORMAT}; {remedy}")
    if not intact:
        raise ValueError(f"{printable(path)} is not what was written (SHA-256)")
    values.setdefault("files", {})
    for name in convert(values, _Stored, path, remedy=_REMEDY).files:
        if Path(name).name != name or name in ("..", INFO) or "\0" in name:
            raise ValueError(f"{printable(path)}: files: {printable(name)!r} is no file of this folder; {_REMEDY}")
    return values


class _Architecture(msgspec.Struct):
    model: dict[str, Any]


class _WithModel(msgspec.Struct):
    config: _Architecture


def read_model(checkpoint: str | Path) -> ModelConfig:
    """Return the architecture of the model that a checkpoint holds, whatever else it says.

    Raises:
        ValueError: As `read_info`, or it says none, or an impossible one.
    """
    origin = Path(checkpoint) / INFO
    found = convert(read_info(checkpoint), _WithModel, origin, remedy=_REMEDY)
    return ModelConfig.from_dict(found.config.model, f"{printable(origin)}: config.model")


def sealed(values: dict[str, Any]) -> str:
    """Return the text of a `checkpoint.json` that holds `values` and their seal."""
    return json.dumps({**values, "sha256": _digest(values)}, indent=1)


def is_sealed(values: dict[str, Any]) -> bool:
    """Return whether values that were read, their seal among them, are those that were sealed."""
    unsealed = {key: value for key, value in values.items() if key != "sha256"}
    return values.get("sha256") == _digest(unsealed)


def _digest(values: dict[str, Any]) -> str:
    as_read = json.loads(json.dumps(values))  # JSON turns every key into a string, and tuples into lists
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()
