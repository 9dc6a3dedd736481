"""The data of a run: opened and checked before anything is built, and its place kept in checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist

from data_pipeline import Manifest, MixtureDataset, Stage, WeightedDataset, open_dataset
from data_pipeline.batches.mixture_changes import differences, order_id
from data_pipeline.batches.skipping import SkippedPositions
from data_pipeline.batches.token_split import TokenSplit
from data_pipeline.shards.checksums import check_content, copy_id, record_content, unread_shards
from data_pipeline.tokenizer.comparison import difference
from gptoss_dist.checkpoint import DataPlace, SkippedSamples
from gptoss_dist.checkpoint.formats.pretrained import Pretrained
from gptoss_dist.config import Config, DataConfig, SourceConfig, StageConfig
from gptoss_dist.distributed.collectives import all_gather_objects, raise_on_every_rank
from gptoss_dist.parallel.mesh import count_data_groups
from gptoss_dist.train.start import Start, print_message


def sources(config: DataConfig) -> list[SourceConfig]:
    """List the sources of `data.sources`, or `data.path` as the only one."""
    if config.sources:
        return list(config.sources)
    assert config.path is not None, "Config fills in a path where there are no sources"
    return [SourceConfig(path=config.path)]


class UnreadableSources(ValueError):
    """Sources of the training data that cannot be opened, or do not fit the model.

    Its text is why the first of them cannot, and how many more there are.
    """

    def __init__(self, reasons: list[str]) -> None:
        self.reasons = reasons
        """One line for each of them, in the order of `data.sources`."""
        others = len(reasons) - 1
        more = f"; {others} more of data.sources cannot be used either, which --dry-run names" if others else ""
        super().__init__(f"{reasons[0]}{more}")


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on, in all of its parts between resumes."""

    mixture: MixtureDataset
    """A mixture of one source where there is only one."""
    start_step: int
    """Optimizer steps done when this mixture took over."""
    history: list[dict]
    """Changes of the mixture on resume: `step`, `samples` consumed by then, and what has `changed`, in words."""

    path: str | None = None
    """`data.path`, if there is only that."""
    skipped: tuple[SkippedSamples, ...] = ()
    """All that the run skips, in the order in which it went back for it; also what was skipped of earlier mixtures."""

    @cached_property
    def order_id(self) -> str:
        """What tells the order of this mixture from others."""
        return order_id(self.mixture.state())

    @cached_property
    def skipped_positions(self) -> SkippedPositions:
        """What is skipped of this mixture; positions of another one are other samples."""
        return SkippedPositions((s["first"], s["end"]) for s in self.skipped if s["order"] == self.order_id)

    def samples_between(self, position: int, later: int) -> int:
        """Return how many positions are read from `position` on before `later`."""
        return self.skipped_positions.reads_before(later) - self.skipped_positions.reads_before(position)

    def place(self, position: int) -> DataPlace:
        """Return what a checkpoint keeps: all that is needed to go on from `position`, with this mixture or another."""
        state = {"start_step": self.start_step, "history": self.history, "read": self.mixture.consumed_at(position)}
        return DataPlace(
            path=self.path,
            content_sha256=self.mixture.content_sha256,
            versions=_versions(self.mixture.sources[0].dataset),
            mixture=self.mixture.state() | state,
            skipped=list(self.skipped),
        )


@dataclass(frozen=True)
class RunData:
    """All the data that a run reads."""

    training: TrainingData
    validation: dict[str, TokenSplit]
    """The held-out split of each source that has one, by the source's name; none if the run does not validate."""


def open_data(config: Config, world_size: int, start: Start) -> RunData:
    """Open what a run reads, the training data where `start` left them.

    Args:
        world_size: Number of ranks.

    Raises:
        ValueError: Data that do not fit the model, the checkpoint or each other, or that end before the run; or ranks
            that cannot be split into context groups.
    """
    groups = count_data_groups(config.parallel, world_size)
    samples_per_step = config.train.micro_batch_size * config.train.gradient_accumulation * groups
    training = open_training_data(config, samples_per_step, start)
    validation = open_validation(config, print_message) if config.validation.every else {}
    return RunData(training, validation)


def open_training_data(config: Config, samples_per_step: int, start: Start | None = None) -> TrainingData:
    """Open the training data, where `start` left them.

    Raises:
        UnreadableSources: A ValueError about sources that cannot be opened or do not fit the model.
        ValueError: Data that do not fit the checkpoint or each other, or that end before the run.
    """
    start = start or Start()
    opened = _open_sources(config)
    mixing = _Mixing(opened, config.data.stages, samples_per_step)
    if start.info is None:
        data = TrainingData(mixing.begin(0, 0, None), 0, [])
    else:
        data = _continued(mixing, start, may_change=config.data.change_mixture)
    data = dataclasses.replace(data, path=config.data.path, skipped=start.skipped)
    check_length(data, start, config.train.steps, samples_per_step)
    return data


@dataclass(frozen=True)
class _Mixing:
    """The mixture that the settings name, wherever it begins."""

    sources: list[WeightedDataset]
    stages: Sequence[StageConfig]
    samples_per_step: int

    def begin(self, position: int, step: int, consumed: dict[str, int] | None) -> MixtureDataset:
        """Return the mixture that takes over at `position`, after `step` steps.

        Args:
            consumed: Samples read of each source before, by the hash of its content.
        """
        stages = [Stage(position + (s.from_step - step) * self.samples_per_step, s.weights) for s in self.stages]
        return MixtureDataset(self.sources, stages=stages, start=position, consumed=consumed)


def _continued(mixing: _Mixing, start: Start, *, may_change: bool) -> TrainingData:
    """Return the data of a resumed run: the mixture of its checkpoint, or if it `may_change` another from there on."""
    checkpoint, info = start.checkpoint, start.info
    assert info is not None
    for what, version in _versions(mixing.sources[0].dataset).items():
        if (old := info.data.versions.get(what, 1)) != version:
            raise ValueError(
                f"{checkpoint} was trained with version {old} of {what}, this is version {version}, which gives "
                f"other samples: its place in the data is lost; go on with the code that wrote it, or start a new "
                f"run with --init.from {checkpoint}"
            )
    before = info.data.mixture
    mixture = mixing.begin(before["start"], before["start_step"], before["consumed"])
    changed = differences(before, mixture.state())
    if not changed:
        return TrainingData(mixture, before["start_step"], before["history"])
    if not may_change:
        raise ValueError(
            f"{checkpoint} was trained with other data: {'; '.join(changed)}; its place in them is lost; undo "
            "the change, or read on from where each source was left with --data.change_mixture true"
        )
    mixture = mixing.begin(start.samples_consumed, start.step, before["read"])
    change = {"step": start.step, "samples": start.samples_consumed, "changed": changed}
    return TrainingData(mixture, start.step, [*before["history"], change])


def check_length(data: TrainingData, start: Start, steps: int, samples_per_step: int) -> None:
    """Refuse data that end before a run of `steps` steps does.

    Raises:
        ValueError: They do, without the samples that are skipped.
    """
    end = data.mixture.positions_total
    if end is None:
        return
    left = data.samples_between(start.samples_consumed, max(end, start.samples_consumed))
    if left < max(steps - start.step, 0) * samples_per_step:
        needed = start.samples_consumed + (steps - start.step) * samples_per_step
        skipped = data.skipped_positions.total
        but = f", of which {skipped:,} are skipped" if skipped else ""
        raise ValueError(
            f"train.steps={steps} needs {needed:,} samples, but the data end after {end:,}{but}; allow more "
            f"max_epochs, or set --train.steps {start.step + left // samples_per_step}"
        )


def check_tokenizer(config: Config, weights: Pretrained | None, data: RunData) -> None:
    """Refuse weights that were trained with another tokenizer than that of the data, unless the settings allow it.

    Raises:
        ValueError: They were, and nobody said that this is meant.
    """
    if weights is None:
        return
    tokenizer = data.training.mixture.tokenizer
    differs = difference(weights.folder, tokenizer)
    if differs is None:
        print_message(f"{weights.folder} has no tokenizer beside it that could be compared with that of the data")
    elif differs and not config.init.get("other_tokenizer"):
        raise ValueError(
            f"init.from={config.init['from']} does not fit the data, which were made with tokenizer {tokenizer.name} "
            f"({tokenizer.n_vocab} ids): {differs}; prepare the data with the model's, or, if the model is to learn "
            "the tokens anew, set --init.other_tokenizer true"
        )


def open_validation(config: Config, message: Callable[[str], None]) -> dict[str, TokenSplit]:
    """Return the validation split of every source that has one, by the source's name."""
    chosen = [source for source in sources(config.data) if _has_validation(source)]
    if not chosen:
        raise ValueError(
            f"{', '.join(source.path for source in sources(config.data))}: no validation split; train with "
            "--validation.every 0, prepare with a larger --validation-fraction, or hold documents out with "
            "python -m data_pipeline.split"
        )
    for source in sources(config.data):
        if source not in chosen:
            message(f"{source.label} has no validation split: it is left out of the validation loss")
    return {source.label: _open(config, source, "validation") for source in chosen}


def verify(config: DataConfig, message: Callable[[str], None], group: dist.ProcessGroup | None = None) -> None:
    """Compare the files of all sources with their checksums as `verify` says; collective.

    Ranks that see the same files read a share of them each; where machines have copies of their own, each copy is read.

    Args:
        config: What names the sources, and when they are compared.
        message: Gets a line, once, about what is read.
        group: A group of all ranks, to wait in for the one that has most to read, if not the default one.

    Raises:
        ValueError: A file differs, or a source is not the same everywhere. It is raised on every rank, and names the
            first of them.
    """
    if config.verify == "never":
        return
    folders = [source.path for source in sources(config)]
    manifests = raise_on_every_rank(lambda: [Manifest.read(folder) for folder in folders])
    always = config.verify == "always"

    def look(folder: str, manifest: Manifest) -> tuple[str, str, int]:
        unread = sum(shard.tokens for shard in unread_shards(folder, manifest, always=always))
        return manifest.content_sha256, copy_id(folder, manifest), unread

    of_ranks = all_gather_objects(raise_on_every_rank(lambda: list(map(look, folders, manifests))))  # [rank][source]
    for folder, found in zip(folders, zip(*of_ranks)):
        if len({content for content, _, _ in found}) > 1:
            raise ValueError(f"{folder}: is not the same dataset for all ranks; copy it to all machines again")
    unread = {copy: tokens for found in of_ranks for _, copy, tokens in found if tokens}
    if unread:
        message(f"comparing {sum(unread.values()):,} tokens with their checksums (data.verify)")
    mine = dist.get_rank()
    # Of each folder, the ranks that see the same copy of it as this one.
    alike = [
        [rank for rank, found in enumerate(of_ranks) if found[n][1] == of_ranks[mine][n][1]]
        for n in range(len(folders))
    ]

    def check() -> None:
        for folder, manifest, ranks in zip(folders, manifests, alike):
            check_content(folder, manifest, part=ranks.index(mine), parts=len(ranks), always=always)

    raise_on_every_rank(check, group)
    for folder, manifest, ranks in zip(folders, manifests, alike):
        if ranks[0] == mine:
            record_content(folder, manifest)


def _versions(dataset: TokenSplit) -> dict[str, int]:
    """Return the versions of the code that decides which samples come when.

    Args:
        dataset: Any source, as all are packed alike.
    """
    return {f"data.packing={dataset.packing}": dataset.plan_version, "mixing": MixtureDataset.order_version}


def _open_sources(config: Config) -> list[WeightedDataset]:
    """Open the training split of every source, or raise UnreadableSources about all that cannot be."""
    opened, reasons = [], []
    for source in sources(config.data):
        try:
            dataset = _open(config, source, "train")
            opened.append(WeightedDataset(source.label, dataset, source.weight, source.max_epochs))
        except ValueError as error:
            reasons.append(str(error))
    if reasons:
        raise UnreadableSources(reasons)
    return opened


def _open(config: Config, source: SourceConfig, split: str) -> TokenSplit:
    dataset = open_dataset(
        source.path, packing=config.data.packing, seq_len=config.data.seq_len, split=split, seed=config.run.seed
    )
    if dataset.n_vocab > config.model.vocab_size:
        key = f"data.path={source.path}" if config.data.path else f"data.sources: {source.path}"
        raise ValueError(
            f"{key} was made with a tokenizer of {dataset.n_vocab} ids, more than "
            f"model.vocab_size={config.model.vocab_size}; set --model.vocab_size {dataset.n_vocab} or more, or "
            "prepare the data with a smaller tokenizer"
        )
    return dataset


def _has_validation(source: SourceConfig) -> bool:
    manifest = Manifest.read(source.path)
    return "validation" in manifest.splits and manifest.documents("validation") > 0
