"""What settings must have in common: a function for each subject, which raises ValueError with key, value and remedy.

The range of a single setting is declared beside it, with `ranged`.
"""

from __future__ import annotations

from data_pipeline.secrets import has_hidden
from gptoss_dist.config.data import DataConfig, SourceConfig, StageConfig
from gptoss_dist.config.distributed import DistributedConfig
from gptoss_dist.config.parallel import ParallelConfig
from gptoss_dist.config.sections import (
    CheckpointConfig,
    EvaluationConfig,
    Init,
    LossConfig,
    OptimConfig,
    RunConfig,
    SpikesConfig,
    TrackingConfig,
    TrainConfig,
    ValidationConfig,
)
from gptoss_dist.model.config import ModelConfig

MOST_BYTES_OF_A_NAME = 255
"""What file systems allow."""


def check_loss(loss: LossConfig, model: ModelConfig) -> None:
    """Refuse to balance by a bias that the model does not have."""
    _require(
        loss.selection_bias_rate == 0 or model.router_selection_bias,
        f"loss.selection_bias_rate={loss.selection_bias_rate} needs --model.router_selection_bias true",
    )


def check_recompute(train: TrainConfig, parallel: ParallelConfig) -> None:
    """Refuse to keep for a second forward pass what only has one, or what no process sends."""
    _require(
        not train.keep_all_to_all or train.activation_checkpointing > 0,
        f"train.keep_all_to_all={train.keep_all_to_all} needs --train.activation_checkpointing 1 or more: without it "
        "nothing is exchanged again",
    )
    _require(
        not train.keep_all_to_all or parallel.expert_parallel != 1 or parallel.context_parallel > 1,
        f"train.keep_all_to_all={train.keep_all_to_all} has nothing to keep: with parallel.expert_parallel=1 and "
        "parallel.context_parallel=1 nothing is exchanged; leave it out, or raise one of them",
    )


def check_length_of_samples(data: DataConfig, model: ModelConfig) -> None:
    """Refuse samples that are longer than the model's positions."""
    _require(
        data.seq_len <= model.max_position_embeddings,
        f"data.seq_len={data.seq_len} exceeds model.max_position_embeddings={model.max_position_embeddings}",
    )


def check_context(data: DataConfig, parallel: ParallelConfig) -> None:
    """Refuse to split samples into more parts than they have tokens: each process has two."""
    parts = 2 * parallel.context_parallel
    _require(
        parallel.context_parallel == 1 or data.seq_len >= parts,
        f"parallel.context_parallel={parallel.context_parallel} splits each sample into {parts} parts, and "
        f"data.seq_len={data.seq_len} has fewer tokens; set --parallel.context_parallel {max(1, data.seq_len // 2)} or "
        "less, or a longer --data.seq_len",
    )


def check_schedule(optim: OptimConfig, train: TrainConfig) -> None:
    """Refuse a warm-up and a final decay that are longer than the run or overlap, and a decay that is not used."""
    warmup, decay, steps = optim.warmup(train.steps), optim.decay_steps, train.steps
    _require(
        warmup <= steps,
        f"optim.warmup_steps={warmup} is more than train.steps={steps}, so the run would end before its peak; set "
        f"--optim.warmup_steps {steps // 10} or another up to {steps}",
    )
    if optim.schedule == "wsd":
        _require(
            0 < decay <= steps,
            f"optim.decay_steps={decay} must be in [1, train.steps={steps}] for optim.schedule=wsd",
        )
        _require(
            warmup + decay <= steps,
            f"optim.warmup_steps={warmup} and optim.decay_steps={decay} overlap in a run of train.steps={steps}; "
            f"shorten one of them by {warmup + decay - steps} or more",
        )
    else:
        _require(
            decay == 0,
            f"optim.decay_steps={decay} has no meaning with optim.schedule={optim.schedule}, which is not wsd; leave "
            "it out, or set --optim.schedule wsd",
        )


def check_init(init: Init) -> None:
    """Refuse what is no name of weights; jsonargparse does not look into a dictionary that is typed as a whole."""
    where, other = init.get("from"), init.get("other_tokenizer", False)
    _require(
        where is None or (isinstance(where, str) and where),
        f"init.from={where!r} is no place of weights; give hf:FOLDER, openai:FOLDER, or the folder of a run",
    )
    _require(isinstance(other, bool), f"init.other_tokenizer={other!r} must be true or false")


def check_name(run: RunConfig) -> None:
    """Refuse a name that is no folder below `runs`, or cannot be shown in a line."""
    name = run.name
    problem = (
        "has characters that cannot be shown"
        if not name.isprintable()
        else f"has {len(name.encode())} bytes"
        if len(name.encode()) > MOST_BYTES_OF_A_NAME
        else "leads out of the folder runs"
        if name.startswith("/") or {".", "..", ""} & set(name.split("/"))
        else "is blank"
        if not name.strip()
        else ""
    )
    _require(
        not problem,
        f"run.name={name!r} {problem}; give a name of 1 to {MOST_BYTES_OF_A_NAME} visible characters (a folder "
        "elsewhere is --run.dir)",
    )


def check_texts(values: object, key: str = "") -> None:
    """Refuse texts that are no Unicode, as names of files in another encoding are: no file of settings could hold them.

    Args:
        values: The settings as nested plain values.
        key: What messages call them.
    """
    if isinstance(values, dict):
        for name, value in values.items():
            check_texts(name, key)
            check_texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list | tuple):
        for value in values:
            check_texts(value, key)
    elif isinstance(values, str) and not values.isascii():
        _require(
            not any("\ud800" <= character <= "\udfff" for character in values),
            f"{key}={values!r} is not UTF-8, so config.yaml could not hold it; rename it",
        )


def check_what_is_unused(train: TrainConfig, checkpoint: CheckpointConfig, validation: ValidationConfig) -> None:
    """Refuse settings that would do nothing where they are given, because another one that they need is missing."""
    _require(
        train.compile or train.compile_mode == "default",
        f"train.compile_mode={train.compile_mode} has no meaning without --train.compile true",
    )
    _require(
        not (train.find_non_finite and train.compile),
        "train.find_non_finite=True looks at the output of every module, which compiled blocks do not give; set "
        "--train.compile false",
    )
    _require(
        train.profile_step <= train.steps,
        f"train.profile_step={train.profile_step} is after the last step of the run, train.steps={train.steps}; give "
        "an earlier one",
    )
    _require(
        not checkpoint.keep_best or validation.every,
        "checkpoint.keep_best=True goes by the validation loss; set --validation.every, or leave it out",
    )


def check_spikes(spikes: SpikesConfig, checkpoint: CheckpointConfig) -> None:
    """Refuse to go back where there will be nothing to go back to."""
    _require(
        not spikes.max_rewinds or checkpoint.every,
        f"spikes.max_rewinds={spikes.max_rewinds} needs checkpoints to go back to; set --checkpoint.every",
    )
    _require(
        spikes.before < spikes.window,
        f"spikes.before={spikes.before} must be less than spikes.window={spikes.window}, the steps that are kept in "
        "mind; give a smaller one",
    )


def check_evaluation(evaluation: EvaluationConfig, distributed: DistributedConfig) -> None:
    """Refuse tasks that are never run, times without tasks, and a wait that ends the run before it is over."""
    _require(
        not evaluation.every or evaluation.tasks,
        f"evaluation.every={evaluation.every} has nothing to run; name tasks with --evaluation.tasks",
    )
    _require(
        not evaluation.tasks or evaluation.every,
        f"evaluation.tasks={evaluation.tasks} are never run; set --evaluation.every",
    )
    for key, limit in (("timeout", distributed.timeout), ("evaluation_timeout", distributed.evaluation_timeout)):
        _require(
            not evaluation.every or not limit or evaluation.max_seconds < limit,
            f"evaluation.max_seconds={evaluation.max_seconds} must be less than distributed.{key}={limit}, after which "
            "ranks that wait are taken for stalled",
        )


def check_uri(tracking: TrackingConfig) -> None:
    """Refuse an address that was read from a run's settings, where its secrets are hidden."""
    _require(
        not has_hidden(tracking.uri),
        f"tracking.uri={tracking.uri} has its secrets hidden, as all that a run writes; give it anew with "
        "--tracking.uri, or add --tracking.uri null and set MLFLOW_TRACKING_URI",
    )


def check_data(data: DataConfig) -> None:
    """Refuse contradictions about what is read, and how it is packed."""
    _require(
        not (data.path and data.sources),
        f"data.path={data.path} and data.sources are both given; to read the sources add --data.path null",
    )
    _require(
        data.packing == "contiguous" or not data.document_mask,
        f"data.packing={data.packing} masks documents by itself; leave data.document_mask out",
    )
    names = [source.label for source in data.sources]
    _check_names(names)
    _check_weights(data.sources)
    _require(not data.stages or len(names) > 1, f"data.stages={len(data.stages)} need two data.sources")
    _check_stages(data.stages, names)


def _check_names(names: list[str]) -> None:
    for name in names:
        _require(name and "/" not in name, f"data.sources={name} is no name; give the source another `name`")
        _require(names.count(name) == 1, f"data.sources={name} is there twice; give one of them another `name`")


def _check_weights(sources: tuple[SourceConfig, ...]) -> None:
    weights = {source.label: source.weight for source in sources}
    missing = [weight is None for weight in weights.values()]
    _require(
        not weights or any(weight is None or weight > 0 for weight in weights.values()),
        f"data.sources={weights} leave nothing to read; give one a weight of more than 0",
    )
    _require(
        all(missing) or not any(missing),
        f"data.sources={weights} give a weight to some only; give one to all, or to none for shares by tokens",
    )


def _check_stages(stages: tuple[StageConfig, ...], names: list[str]) -> None:
    last = 0
    for stage in stages:
        _require(
            stage.from_step > last,
            f"data.stages: {stage.label} must be more than {last}: stages come in order, after the weights of the "
            "sources",
        )
        last = stage.from_step
        _require(
            any(stage.weights.values()),
            f"data.stages: {stage.label} weights={stage.weights} leave nothing to read; give one more than 0",
        )
        for name, weight in stage.weights.items():
            _require(
                name in names,
                f"data.stages: {stage.label} weight of {name}={weight} is for no source; there are {', '.join(names)}",
            )


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)
