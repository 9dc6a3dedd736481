"""The one tree of settings that YAML files and the command line fill. Each field is documented here only."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

import yaml

from gptoss_dist.config.data import DataConfig
from gptoss_dist.config.parallel import EngineConfig, ParallelConfig
from gptoss_dist.model.config import ModelConfig


@dataclass
class RunConfig:
    """Identity of the run. Everything it writes goes to one folder."""

    name: str = "run"
    """Name in MLflow, and of the folder."""
    dir: str | None = None
    """The run's folder (config, metrics, checkpoints, plots, samples, log); null means runs/<name>."""
    seed: int = 0
    """Seeds the weights, the data order, and python, numpy and torch."""


@dataclass
class TrainConfig:
    """The training loop."""

    steps: int = 1000
    """Optimizer steps in all, including those before a resume."""
    micro_batch_size: int = 8
    """Samples per process and forward pass."""
    gradient_accumulation: int = 1
    """Forward-backward passes per optimizer step."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute type. Master weights, optimizer state and gradient reduction are always float32."""
    activation_checkpointing: int = 0
    """Recompute every n-th block in the backward pass: 0 none, 1 every block, 3 every third."""
    keep_all_to_all: bool = False
    """With activation checkpointing: keep what the all-to-alls of expert parallelism brought, instead of exchanging the
    tokens again in the backward pass."""
    routing: Literal["learned", "balanced", "replay"] = "learned"
    """For benchmarks only, and labelled so in the metrics: `balanced` sends every expert the same number of tokens,
    `replay` repeats the routing of the first batch. The model learns nothing useful with either."""
    compile: bool = False
    """torch.compile each block (needs a C++ compiler on CPU)."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """Mode of torch.compile."""
    deterministic: bool = False
    """Refuse operations without a deterministic implementation (torch.use_deterministic_algorithms)."""
    profile_step: int = 0
    """Record this optimizer step with torch.profiler on rank 0 into the run's folder `profile/`; 0 records none."""
    max_skipped_steps: int = 5
    """Stop after this many steps in a row with a non-finite loss or gradient; each such step is skipped."""
    log_every_s: float = 10.0
    """Seconds between progress lines where there is no terminal."""


@dataclass
class OptimConfig:
    """AdamW and its schedule. Norms, biases, sinks and embeddings are not decayed."""

    lr: float = 4e-4
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """`wsd`: warm-up, stable, then decay over the last `decay_steps` (MiniCPM, arXiv:2404.06395)."""
    decay_steps: int = 0
    """Length of the final decay of `wsd`."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of Adam's two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the decayed parameters."""
    clip_norm: float = 1.0
    """Limit of the global gradient norm; 0 switches clipping off."""
    freeze: list[str] = field(default_factory=list)
    """Patterns of the names of parameters that stay as they are, such as "*.router.*" or "model.layers.[0-3].*": no
    gradient, no optimizer state, no part in the gradient norm."""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Factors of the learning rate by such patterns; the last that matches counts."""


@dataclass
class LossConfig:
    """Auxiliary losses of the router. Each is logged by itself and never counted into the reported loss."""

    aux_coef: float = 0.01
    """Weight of the load-balancing loss; 0 switches it off."""
    z_coef: float = 0.0
    """Weight of the router z-loss; 0 switches it off."""
    router_jitter: float = 0.0
    """Relative size of the noise on the router's input while training; 0 switches it off."""
    selection_bias_rate: float = 0.0
    """Balance without a loss: step of the bias that decides on the choice of experts, in units of a logit (DeepSeek-V3
    uses 0.001 on scores in [0, 1]); 0 switches it off. Needs model.router_selection_bias, and aux_coef near 0."""


Init = TypedDict("Init", {"from": str | None})  # not a dataclass, because a field cannot have that name


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    every: int = 500
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = 3
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every: int = 0
    """Keep those of steps that are multiples of this for good; 0 keeps none so."""
    keep_best: bool = False
    """Keep the one with the lowest validation loss too, of those saved right after a validation."""
    asynchronous: bool = True
    """Write beside the training, from a copy in host memory; false makes the step wait until the disk has it."""
    dir: str | None = None
    """Folder of the checkpoints; null means <run.dir>/checkpoints."""


@dataclass
class ValidationConfig:
    """Loss on the held-out split."""

    every: int = 500
    """Steps between validations; 0 switches them off. There is one before the first step and one after the last."""
    samples: int = 256
    """Samples of the validation split to use, always the same ones."""


@dataclass
class SamplingConfig:
    """Text written by the model while it trains."""

    every: int = 0
    """Steps between samples; 0 switches them off. The last step is followed by samples in any case."""
    prompts: list[str] = field(default_factory=list)
    """Texts to continue."""
    max_new_tokens: int = 64
    """Tokens to write per prompt."""
    temperature: float = 0.8
    """0 takes the most likely token."""
    top_k: int = 50
    """Sample from this many most likely tokens; 0 is all."""


@dataclass
class TrackingConfig:
    """MLflow. metrics.jsonl in the run's folder is always written."""

    mlflow: bool = True
    """Mirror metrics, parameters, plots and samples to MLflow."""
    experiment: str = "gptoss_dist"
    """MLflow experiment."""
    uri: str | None = None
    """Tracking server; null means $MLFLOW_TRACKING_URI, or sqlite:///mlflow.db."""
    plots: bool = True
    """Draw the run's plots at each validation and at the end."""
    expert_tokens_every: int = 100
    """Steps between rows of expert_tokens.jsonl (tokens of each expert, summed over those steps); 0 writes none."""


@dataclass
class Config:
    """A complete run."""

    model: ModelConfig
    """A file such as configs/model/tiny.yaml (relative to the file that names it), or its fields."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    init: Init = field(default_factory=lambda: {"from": None})
    """`--init.from` starts from weights: `hf:FOLDER` (transformers' layout), `openai:FOLDER` (OpenAI's), each dense or
    in MXFP4, or the folder of a run or checkpoint. Optimizer and step begin anew. A resumed run has its own weights."""
    resume: str | None = None
    """`auto` continues the newest complete checkpoint of this run if there is one; or a checkpoint's path."""

    def __post_init__(self) -> None:
        positive = ("data.seq_len", "train.steps", "train.micro_batch_size", "train.gradient_accumulation")
        positive += ("train.max_skipped_steps", "optim.eps", "validation.samples", "sampling.max_new_tokens")
        for key in positive:
            _require(self[key] > 0, key, self[key], "must be positive")
        zero_or_more = ("train.activation_checkpointing", "optim.lr", "optim.warmup_steps", "optim.decay_steps")
        zero_or_more += ("optim.weight_decay", "optim.clip_norm", "loss.aux_coef", "loss.z_coef")
        zero_or_more += ("loss.selection_bias_rate", "train.profile_step")
        zero_or_more += ("checkpoint.every", "checkpoint.keep", "checkpoint.keep_every", "validation.every")
        zero_or_more += ("sampling.every", "data.prefetch", "data.workers")
        zero_or_more += ("sampling.temperature", "sampling.top_k", "train.log_every_s", "tracking.expert_tokens_every")
        for key in zero_or_more:
            _require(self[key] >= 0, key, self[key], "must be 0 or more")
        _require(0 <= self.optim.min_lr_ratio <= 1, "optim.min_lr_ratio", self.optim.min_lr_ratio, "must be in [0, 1]")
        _require(0 <= self.loss.router_jitter < 1, "loss.router_jitter", self.loss.router_jitter, "must be in [0, 1)")
        _require(
            self.loss.selection_bias_rate == 0 or self.model.router_selection_bias,
            "loss.selection_bias_rate",
            self.loss.selection_bias_rate,
            "needs --model.router_selection_bias true",
        )
        _require(
            not self.train.keep_all_to_all or self.train.activation_checkpointing > 0,
            "train.keep_all_to_all",
            self.train.keep_all_to_all,
            "needs --train.activation_checkpointing 1 or more: without it nothing is exchanged again",
        )
        _require(
            len(self.optim.betas) == 2 and all(0 <= b < 1 for b in self.optim.betas),
            "optim.betas",
            self.optim.betas,
            "must be two numbers in [0, 1)",
        )
        _require(
            self.data.seq_len <= self.model.max_position_embeddings,
            "data.seq_len",
            self.data.seq_len,
            f"exceeds model.max_position_embeddings={self.model.max_position_embeddings}",
        )
        _require(
            self.optim.schedule != "wsd" or 0 < self.optim.decay_steps <= self.train.steps,
            "optim.decay_steps",
            self.optim.decay_steps,
            f"must be in [1, train.steps={self.train.steps}] for optim.schedule=wsd",
        )

        self._check_data()
        self._read_deepspeed_settings()

    def _check_data(self) -> None:
        data = self.data
        _require(
            not (data.path and data.sources),
            "data.path",
            data.path,
            "and data.sources are both given; to read the sources add --data.path null",
        )
        if not data.path and not data.sources:
            data.path = "data/pystdlib"
        names = [source.label for source in data.sources]
        for name in names:
            _require(name and "/" not in name, "data.sources", name, "is no name; give the source another `name`")
            _require(names.count(name) == 1, "data.sources", name, "is there twice; give one of them another `name`")
        for source in data.sources:
            key = f"data.sources: {source.label}"
            _require(source.weight is None or source.weight >= 0, f"{key} weight", source.weight, "must be 0 or more")
            _require(source.max_epochs is None or source.max_epochs > 0, f"{key} max_epochs", source.max_epochs,
                     "must be positive")  # fmt: skip
        given = [source.weight is not None for source in data.sources]
        _require(all(given) or not any(given), "data.sources", dict(zip(names, (s.weight for s in data.sources))),
                 "give a weight to some only; give one to all, or to none for shares by tokens")  # fmt: skip
        _require(not data.stages or len(data.sources) > 1, "data.stages", len(data.stages), "need two data.sources")
        last = 0
        for stage in data.stages:
            _require(stage.from_step > last, "data.stages: from_step", stage.from_step,
                     f"must be more than {last}: stages come in order, after the weights of the sources")  # fmt: skip
            last = stage.from_step
            for name, weight in stage.weights.items():
                key = f"data.stages: from_step={stage.from_step} weight of {name}"
                _require(name in names, key, weight, f"is for no source; there are {', '.join(names)}")
                _require(weight >= 0, key, weight, "must be 0 or more")
        _require(not (data.document_mask and data.packing != "contiguous"), "data.packing", data.packing,
                 "masks documents by itself; leave data.document_mask out")  # fmt: skip

    def _read_deepspeed_settings(self) -> None:
        """Put a file's contents in the place of its name: what is saved with the run needs no other file."""
        engine = self.engine
        if isinstance(engine.deepspeed, str):
            path = Path(engine.deepspeed)
            try:
                engine.deepspeed = json.loads(path.read_text())
            except (OSError, ValueError) as error:
                raise ValueError(f"engine.deepspeed={path} is not a readable JSON file: {error}") from None
            _require(isinstance(engine.deepspeed, dict), "engine.deepspeed", path, "must hold one JSON object")

    def __getitem__(self, key: str):
        section, name = key.split(".")
        return getattr(getattr(self, section), name)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run.dir or os.path.join("runs", self.run.name))

    @property
    def checkpoint_folder(self) -> Path:
        """Folder of the run's checkpoints."""
        return Path(self.checkpoint.dir or self.folder / "checkpoints")

    def to_dict(self) -> dict:
        """Nested plain values, ready for YAML or JSON."""
        values = dataclasses.asdict(self)
        values["data"] |= {name: list(values["data"][name]) for name in ("sources", "stages")}
        return values

    def save(self, path: str | Path) -> None:
        """Write the settings as YAML, without `resume`, so that the file starts the same run anew under any name."""
        Path(path).write_text(yaml.safe_dump(self.to_dict() | {"resume": None}, sort_keys=False))


def _require(condition: bool, key: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{key}={value} {remedy}")
