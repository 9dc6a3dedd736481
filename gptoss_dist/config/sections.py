"""Sections of the configuration that have no page of their own: the loop, its optimizer and losses, what it saves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NotRequired, TypedDict

from data_pipeline.command_line import option, ranged, ranged_like
from gptoss_dist.model.sampling import Sampling


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

    steps: int = ranged(1000, above=0)
    """Optimizer steps in all, including those before a resume."""
    micro_batch_size: int = ranged(8, above=0, at_most=2**20)
    """Samples per process, or group of parallel.context_parallel processes, and forward pass."""
    gradient_accumulation: int = ranged(1, above=0)
    """Forward-backward passes per optimizer step."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute type. Master weights, optimizer state and gradient reduction are always float32."""
    activation_checkpointing: int = ranged(0, at_least=0)
    """Recompute every n-th block in the backward pass: 0 none, 1 every block, 3 every third."""
    keep_all_to_all: bool = False
    """With activation checkpointing: keep what the all-to-alls of expert parallelism brought, and what came of the keys
    and values of context parallelism, instead of exchanging them again in the backward pass."""
    routing: Literal["learned", "balanced", "replay"] = "learned"
    """For benchmarks only, and labelled so in the metrics: `balanced` sends every expert the same number of tokens,
    `replay` repeats the routing of the first batch. The model learns nothing useful with either."""
    compile: bool = False
    """torch.compile each block (needs a C++ compiler on CPU)."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """Mode of torch.compile."""
    deterministic: bool = False
    """Refuse operations without a deterministic implementation (torch.use_deterministic_algorithms)."""
    profile_step: int = ranged(0, at_least=0)
    """Record this optimizer step with torch.profiler on rank 0 into the run's folder `profile/`; 0 records none."""
    max_skipped_steps: int = ranged(5, above=0)
    """Stop after this many steps in a row with a non-finite loss or gradient; each such step is skipped."""
    find_non_finite: bool = False
    """After a skipped step, name the first module whose output, or else the first parameter whose gradient, was not
    finite, and on which rank. Every output is looked at: steps are slower. Not with train.compile."""
    log_every_s: float = ranged(10.0, at_least=0)
    """Seconds between progress lines where there is no terminal."""


@dataclass
class SpikesConfig:
    """Spikes of the loss: the run goes back to a checkpoint from before one, and skips the samples that came with it.

    It is off by default, because a loss may also rise for good reasons, such as a new stage of a mixture.
    """

    max_rewinds: int = ranged(0, at_least=0)
    """How often a run goes back in all; the next spike ends it. 0 looks for no spikes."""
    window: int = ranged(64, at_least=8, at_most=4096)
    """Steps without a high loss that a step is compared with; no loss is high before there are so many."""
    deviations: float = ranged(8.0, above=0)
    """A loss is high from this many standard deviations above the median on (estimated by the median absolute
    deviation, and at least 0.5 % of the median)."""
    steps: int = ranged(3, above=0)
    """High losses in a row that are a spike."""
    factor: float = ranged(2.0, above=1)
    """A single loss above this many times the median is a spike too."""
    before: int = ranged(1, at_least=0)
    """Steps before the first high loss whose samples are skipped too: the last update before it may be the cause."""
    after: int = ranged(2, at_least=0)
    """Steps after the spike whose samples are skipped too: what came with it may not have ended."""
    margin: int = ranged(10, at_least=0)
    """Steps, at least, between the checkpoint that a run goes back to and the first high loss."""


@dataclass
class OptimConfig:
    """AdamW and its schedule. Norms, biases, sinks and embeddings are not decayed."""

    lr: float = ranged(4e-4, at_least=0)
    """Peak learning rate."""
    min_lr_ratio: float = ranged(0.1, at_least=0, at_most=1)
    """Final learning rate as a share of the peak."""
    warmup_steps: int | None = ranged(None, at_least=0)
    """Steps of linear warm-up from 0; null is 100, or a tenth of a run of fewer than 1000 steps."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """`wsd`: warm-up, stable, then decay over the last `decay_steps` (MiniCPM, arXiv:2404.06395)."""
    decay_steps: int = ranged(0, at_least=0)
    """Length of the final decay of `wsd`."""
    betas: list[float] = ranged(default_factory=lambda: [0.9, 0.95], at_least=0, below=1, length=2)
    """Decay rates of Adam's two moments."""
    eps: float = ranged(1e-8, above=0)
    """Added to the root of the second moment."""
    weight_decay: float = ranged(0.1, at_least=0)
    """Decoupled weight decay of the decayed parameters."""
    clip_norm: float = ranged(1.0, at_least=0)
    """Limit of the global gradient norm; 0 switches clipping off."""
    freeze: list[str] = field(default_factory=list)
    """Patterns of the names of parameters that stay as they are, such as "*.router.*" or "model.layers.[0-3].*": no
    gradient, no optimizer state, no part in the gradient norm."""
    lr_scale: dict[str, float] = ranged(default_factory=dict, at_least=0)
    """Factors of the learning rate by such patterns; the last that matches counts."""

    def warmup(self, steps: int) -> int:
        """Return the steps of warm-up in a run of `steps` steps."""
        return min(100, steps // 10) if self.warmup_steps is None else self.warmup_steps


@dataclass
class LossConfig:
    """Auxiliary losses of the router. Each is logged by itself and never counted into the reported loss."""

    aux_coef: float = ranged(0.01, at_least=0)
    """Weight of the load-balancing loss; 0 switches it off."""
    z_coef: float = ranged(0.0, at_least=0)
    """Weight of the router z-loss; 0 switches it off."""
    router_jitter: float = ranged(0.0, at_least=0, below=1)
    """Relative size of the noise on the router's input while training; 0 switches it off."""
    selection_bias_rate: float = ranged(0.0, at_least=0)
    """Balance without a loss: step of the bias that decides on the choice of experts, in units of a logit (DeepSeek-V3
    uses 0.001 on scores in [0, 1]); 0 switches it off. Needs model.router_selection_bias, and aux_coef near 0."""


# Not a dataclass, because a field cannot have that name. Files of earlier versions lack the second.
Init = TypedDict("Init", {"from": str | None, "other_tokenizer": NotRequired[bool]})


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    every: int = ranged(500, at_least=0)
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = ranged(3, at_least=0)
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every: int = ranged(0, at_least=0)
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

    every: int = ranged(500, at_least=0)
    """Steps between validations; 0 switches them off. There is one before the first step and one after the last."""
    samples: int = ranged(256, above=0)
    """Samples of the validation split to use, always the same ones."""


@dataclass
class SamplingConfig:
    """Text written by the model while it trains."""

    every: int = ranged(500, at_least=0)
    """Steps between samples; 0 writes none. The last step is followed by samples too."""
    prompts: list[str] = option(default_factory=list, may_be_empty=True)
    """Texts to continue."""
    max_new_tokens: int = ranged(64, above=0)
    """Tokens to write per prompt."""
    temperature: float = ranged_like(Sampling, "temperature", 0.8)
    """0 takes the most likely token."""
    top_k: int = ranged_like(Sampling, "top_k", 50)
    """Sample from this many most likely tokens; 0 is all."""


@dataclass
class EvaluationConfig:
    """Tasks of the EleutherAI harness (the extra `eval`) while the model trains, on all ranks together."""

    every: int = ranged(0, at_least=0)
    """Steps between two times; 0 runs none. The last step is followed by one too."""
    tasks: list[str] = field(default_factory=list)
    """Names of tasks or groups, or YAML files."""
    include: str | None = None
    """Folder of further task files, which come before the harness's own."""
    num_fewshot: int | None = ranged(None, at_least=0)
    """Examples in the prompt; null is what the task says."""
    limit: int | None = ranged(200, at_least=1)
    """Documents of each task, always the first ones; null is all."""
    chat: bool = False
    """Put prompts into the model's chat template."""
    batch_tokens: int = ranged(8192, at_least=1)
    """Tokens of a forward pass of one process, padding included."""
    max_seconds: float = ranged(300.0, above=0)
    """How long training waits. What is not finished then, but for the forward passes that are under way, gives no
    result, and the run goes on. The first time includes loading the tasks."""


@dataclass
class TrackingConfig:
    """MLflow. metrics.jsonl in the run's folder is always written."""

    mlflow: bool = True
    """Mirror metrics, parameters, plots and samples to MLflow."""
    experiment: str | None = None
    """MLflow experiment; null means $MLFLOW_EXPERIMENT_NAME, or gptoss_dist."""
    uri: str | None = None
    """Tracking server; null means $MLFLOW_TRACKING_URI, or sqlite:///mlflow.db. Passwords and tokens in it are hidden
    in all that the run writes."""
    also: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Further programs that get the metrics, and only these, each with the extra of its name: `tensorboard` has event
    files in the run's folder `tensorboard/`, `wandb` (Weights & Biases) a run of its own."""
    plots: bool = True
    """Draw the run's plots at each validation and at the end."""
    system_metrics_every_s: float = ranged(30.0, at_least=0)
    """Seconds between samples of each machine's processor, memory, disk, network and GPUs; 0 takes none."""
    expert_tokens_every: int = ranged(100, at_least=0)
    """Steps between rows of expert_tokens.jsonl (tokens of each expert, summed over those steps); 0 writes none."""
    report: bool = True
    """Write the run's report, report.html, at the end: one page to read and to forward. launch/report.py writes it at
    any time."""
