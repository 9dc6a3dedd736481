"""The options of each verb of `launch/evaluate.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data_pipeline.batches import Packing
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
    """Record the result in MLflow too; below the run that the model belongs to, where that is on the same server."""


@dataclass(kw_only=True)
class ModelOptions(ResultOptions):
    """A trained model."""

    checkpoint: str = option()
    """A run's folder, a checkpoint, or an exported model, as for generate.py."""
    device: str | None = None
    """cpu or cuda; null is cuda where there is one."""


def _check_distinct(name: str, values: Sequence[object]) -> None:
    if twice := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"{name}={twice[0]} is there twice; name it once")


@dataclass
class KvCacheOptions(ResultOptions):
    """Size of the key/value cache against that of a model whose layers all see everything."""

    model: str = "configs/model/gptoss_502m.yaml"
    """An architecture."""
    lengths: list[int] = option(default_factory=list, metavar="TOKENS", several=True)
    """Context lengths. Without one: 4096, 16384, 65536 and 131072, as far as the positions reach."""
    batch_size: int = ranged(1, at_least=1)
    """Sequences."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of keys and values."""

    def __post_init__(self) -> None:
        check_ranges(self)
        _check_distinct("lengths", self.lengths)


@dataclass
class ScoringOptions(ModelOptions):
    """A trained model that reads texts, in as many processes as a launcher starts."""

    precision: Literal["fp32", "bf16"] | None = None
    """Type that is computed with; null is bf16 on CUDA and fp32 on a CPU."""
    batch_tokens: int = ranged(8192, at_least=1)
    """Tokens of a forward pass of one process, padding included; a longer text is a forward pass by itself."""


@dataclass
class PasskeyOptions(ScoringOptions):
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

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.lengths:
            raise ValueError("lengths=[] says nothing; give tokens, such as 4096")
        _check_distinct("lengths", self.lengths)
        _check_distinct("yarn", self.yarn)
        check_yarn(self.yarn, self.original_length)


@dataclass
class PerplexityOptions(ScoringOptions):
    """Perplexity, bits per byte, and the loss by the length of the context."""

    data: list[str] = option(default_factory=list, metavar="DATA")
    """A prepared dataset, or text as prepare takes it: files, folders, patterns; may be repeated, with others. Without
    one: what the run that the model belongs to validates on, in the same samples."""
    split: Literal["validation", "train"] = "validation"
    """Split of prepared datasets."""
    seq_len: int | None = ranged(None, at_least=1)
    """Tokens of a window; null is that of the run, or else the positions of the model."""
    stride: int | None = ranged(None, at_least=1)
    """Score each document by itself, in windows that begin so many tokens after each other: only tokens that no earlier
    window had are counted, with at least seq_len - stride tokens before them from the second window on. null takes the
    samples of training, of prepared datasets, and windows side by side, of text."""
    packing: Packing | None = None
    """How samples are made of prepared documents, without a stride; null is that of the run, or else contiguous."""
    samples: int | None = ranged(None, at_least=0)
    """Samples of each dataset, or documents with a stride and of text, evenly over it; 0 is all, null those of the
    run's validation, or else all."""
    text_column: str = "text"
    """Field of records that holds the text."""


@dataclass(kw_only=True)
class HarnessOptions(ScoringOptions):
    """Tasks of the EleutherAI harness (lm-eval), which the extra `eval` installs."""

    tasks: list[str] = option(metavar="TASK", several=True)
    """Names of tasks or groups, or YAML files."""
    include: str | None = None
    """Folder of further task files, which come before the harness's own. Tasks there whose data are files need no
    network."""
    num_fewshot: int | None = ranged(None, at_least=0)
    """Examples in the prompt; null is what the task says."""
    limit: int | None = ranged(None, at_least=1)
    """Documents of each task; null is all."""
    chat: bool = False
    """Put prompts into the model's chat template."""
    system_prompt: str | None = None
    """What the system says first in a chat."""
    max_length: int | None = ranged(None, at_least=2)
    """Tokens that the model may see; longer requests lose their beginning. null is the model's positions."""
    samples: bool = True
    """Keep each request with its answer, in samples.jsonl."""
