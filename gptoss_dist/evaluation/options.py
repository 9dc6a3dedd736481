"""The options of each verb of `launch/evaluate.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_pipeline.command_line import check_ranges, option, ranged
from data_pipeline.needles.tasks import Task
from gptoss_dist.evaluation.retrieval.scaling import check_yarn


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
    lengths: list[int] = option(default_factory=lambda: [4096, 16384, 65536, 131072], metavar="TOKENS")
    """Context lengths."""
    batch_size: int = ranged(1, at_least=1)
    """Sequences."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of keys and values."""


@dataclass
class PasskeyOptions(ModelOptions):
    """Whether a model finds a fact in a long text, by length of the text and depth of the fact."""

    task: Task = "passkey"
    """passkey; or a needle task: single, multi-key, distractors, variables (docs/passkey.md)."""
    lengths: list[int] = option(
        default_factory=lambda: [4096, 16384, 65536, 131072], metavar="TOKENS", several=True, at_least=1
    )
    """Tokens of the prompts, with their question."""
    depths: int = ranged(10, at_least=1, at_most=1000)
    """Buckets of equal width that the depths are drawn from."""
    trials: int = ranged(10, at_least=1)
    """Prompts for each length and bucket."""
    seed: int = 0
    """Draws what is hidden, and where."""
    yarn: list[str] = option(default_factory=lambda: ["model"], metavar="YARN", several=True)
    """Rotary embeddings to compare: model (its own), none (without YaRN), a factor, or auto (length / original length);
    8:4 and auto:4 are with a beta_fast of 4."""
    original_length: int | None = ranged(None, at_least=1)
    """Tokens of the context that the model was trained with; for a factor and auto."""
    batch_tokens: int = ranged(16384, at_least=1)
    """Tokens of prompts that are read together."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.lengths:
            raise ValueError("lengths=[] says nothing; give tokens, such as 4096")
        check_yarn(self.yarn, self.original_length)
