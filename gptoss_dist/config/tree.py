"""The one tree of settings that YAML files and the command line fill.

Each field is documented, and its range declared, beside it and nowhere else: sections.py, data.py, parallel.py,
distributed.py and model/config.py. What two fields must have in common is in checks.py.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.command_line import check_ranges
from data_pipeline.command_line.texts import dump_yaml
from data_pipeline.disk import write_file_atomically
from data_pipeline.foreign import read_json
from data_pipeline.secrets import without_secrets
from gptoss_dist.config import checks
from gptoss_dist.config.data import DataConfig
from gptoss_dist.config.distributed import DistributedConfig
from gptoss_dist.config.parallel import EngineConfig, ParallelConfig
from gptoss_dist.config.sections import (
    CheckpointConfig,
    EvaluationConfig,
    Init,
    LossConfig,
    OptimConfig,
    RunConfig,
    SamplingConfig,
    SpikesConfig,
    TrackingConfig,
    TrainConfig,
    ValidationConfig,
)
from gptoss_dist.model.config import ModelConfig


@dataclass
class Config:
    """A complete run."""

    model: ModelConfig
    """A file such as configs/model/tiny.yaml (relative to the file that names it), or its fields."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    init: Init = field(default_factory=lambda: Init({"from": None, "other_tokenizer": False}))
    """`--init.from` starts from weights: `hf:FOLDER` (transformers' layout), `openai:FOLDER` (OpenAI's), each dense or
    in MXFP4, or the folder of a run or checkpoint. Optimizer and step begin anew. A resumed run has its own weights.
    `--init.other_tokenizer true` takes weights that were trained with another tokenizer than the data."""
    resume: str | None = None
    """`auto` continues the newest complete checkpoint of this run if there is one; or a checkpoint's path."""

    def __post_init__(self) -> None:
        if self.data.path is None and not self.data.sources:
            self.data.path = "data/pystdlib"
        checks.check_init(self.init)
        self.init = {"from": self.init["from"], "other_tokenizer": self.init.get("other_tokenizer", False)}
        self.engine.deepspeed = _read_deepspeed_settings(self.engine.deepspeed)
        self.check()

    def check(self) -> None:
        """Check all settings.

        Raises:
            ValueError: A value is outside its range, or contradicts another one.
        """
        check_ranges(self)
        checks.check_loss(self.loss, self.model)
        checks.check_recompute(self.train, self.parallel)
        checks.check_length_of_samples(self.data, self.model)
        checks.check_context(self.data, self.parallel)
        checks.check_schedule(self.optim, self.train)
        checks.check_data(self.data)
        checks.check_name(self.run)
        checks.check_what_is_unused(self.train, self.checkpoint, self.validation)
        checks.check_texts(self.to_dict())
        checks.check_uri(self.tracking)
        checks.check_spikes(self.spikes, self.checkpoint)
        checks.check_evaluation(self.evaluation, self.distributed)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run.dir or os.path.join("runs", self.run.name))

    @property
    def checkpoint_folder(self) -> Path:
        """Folder of the run's checkpoints."""
        return Path(self.checkpoint.dir or self.folder / "checkpoints")

    def to_dict(self) -> dict:
        """Return nested plain values, ready for YAML or JSON and without secrets: what a run writes of its settings."""
        values = dataclasses.asdict(self)
        if self.tracking.uri:
            values["tracking"]["uri"] = without_secrets(self.tracking.uri)
        values["data"] |= {name: list(values["data"][name]) for name in ("sources", "stages")}
        return values

    def save(self, path: str | Path) -> None:
        """Write the settings as YAML, without `resume`, so that the file starts the same run anew under any name."""
        text = dump_yaml(self.to_dict() | {"resume": None}, allow_unicode=False)
        write_file_atomically(Path(path), text.encode())


def _read_deepspeed_settings(given: str | dict | None) -> dict | None:
    """Return the contents of a file in the place of its name: what is saved with the run then needs no other file."""
    if not isinstance(given, str):
        return given
    try:
        return read_json(given, dict[str, Any], finite=True)
    except ValueError as error:
        raise ValueError(f"engine.deepspeed={error}") from None
