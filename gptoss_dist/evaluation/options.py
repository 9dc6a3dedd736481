"""The options of each verb of `launch/evaluate.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_pipeline.command_line import option, ranged


@dataclass
class ResultOptions:
    """Where results go."""

    output: str | None = None
    """Folder for result.json and plots, which must not be there yet; null makes one in `evaluations/` of the run's
    folder, or of the working directory for a model that belongs to no run."""
    mlflow: bool = True
    """Record the result in MLflow too, below the run that the model belongs to."""


@dataclass(kw_only=True)
class ModelOptions(ResultOptions):
    """A trained model."""

    checkpoint: str = option()
    """A run's folder, a checkpoint, or an exported model, as for generate.py."""
    device: str | None = None
    """cpu or cuda; null is cuda where there is one."""


@dataclass
class KvCacheOptions(ResultOptions):
    """Size of the key/value cache against that of a model whose layers all see everything."""

    model: str = "configs/model/gptoss_502m.yaml"
    """An architecture."""
    lengths: list[int] = option(default_factory=list, metavar="TOKENS")
    """A context length; may be repeated. Without one: 4096, 16384, 65536 and 131072, as far as the positions reach."""
    batch_size: int = ranged(1, at_least=1)
    """Sequences."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of keys and values."""
