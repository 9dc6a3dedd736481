"""What settings must have in common: a function for each subject, which raises ValueError with key, value and remedy.

The range of a single setting is declared beside it, with `ranged`.
"""

from __future__ import annotations

from gptoss_dist.config.data import DataConfig, SourceConfig, StageConfig
from gptoss_dist.config.sections import LossConfig, OptimConfig, TrackingConfig, TrainConfig
from gptoss_dist.model.config import ModelConfig


def check_loss(loss: LossConfig, model: ModelConfig) -> None:
    """Refuse to balance by a bias that the model does not have."""
    _require(
        loss.selection_bias_rate == 0 or model.router_selection_bias,
        f"loss.selection_bias_rate={loss.selection_bias_rate} needs --model.router_selection_bias true",
    )


def check_recompute(train: TrainConfig) -> None:
    """Refuse to keep for a second forward pass what only has one."""
    _require(
        not train.keep_all_to_all or train.activation_checkpointing > 0,
        f"train.keep_all_to_all={train.keep_all_to_all} needs --train.activation_checkpointing 1 or more: without it "
        "nothing is exchanged again",
    )


def check_length_of_samples(data: DataConfig, model: ModelConfig) -> None:
    """Refuse samples that are longer than the model's positions."""
    _require(
        data.seq_len <= model.max_position_embeddings,
        f"data.seq_len={data.seq_len} exceeds model.max_position_embeddings={model.max_position_embeddings}",
    )


def check_schedule(optim: OptimConfig, train: TrainConfig) -> None:
    """Refuse a final decay that is missing, or longer than the run."""
    _require(
        optim.schedule != "wsd" or 0 < optim.decay_steps <= train.steps,
        f"optim.decay_steps={optim.decay_steps} must be in [1, train.steps={train.steps}] for optim.schedule=wsd",
    )


def check_uri(tracking: TrackingConfig) -> None:
    """Refuse an address that was read from a run's settings, where its secrets are hidden."""
    _require(
        "***" not in (tracking.uri or ""),
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
        for name, weight in stage.weights.items():
            _require(
                name in names,
                f"data.stages: {stage.label} weight of {name}={weight} is for no source; there are {', '.join(names)}",
            )


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)
