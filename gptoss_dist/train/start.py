"""Where a run starts: from the beginning, a checkpoint or other weights; and the run's folder."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec
import torch

from data_pipeline.disk import remove_unfinished, write_file_atomically
from data_pipeline.foreign import convert
from data_pipeline.ownership import Ownership, owned
from data_pipeline.printable import printable
from gptoss_dist import checkpoint
from gptoss_dist.checkpoint import CheckpointInfo, SkippedSamples
from gptoss_dist.checkpoint.formats.pretrained import Pretrained
from gptoss_dist.checkpoint.info import INFO
from gptoss_dist.config import Config
from gptoss_dist.distributed import launcher_watch, launchers
from gptoss_dist.distributed.collectives import all_gather_objects, broadcast_object, on_rank_zero
from gptoss_dist.distributed.processes import seed_everything
from gptoss_dist.engine import Engine, EngineSettings
from gptoss_dist.model.config import SHAPING
from gptoss_dist.tracking.about.facts import slurm_job
from gptoss_dist.train import markers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What was done before this process began; by default nothing."""

    checkpoint: Path | None = None
    """The checkpoint that is resumed."""
    info: CheckpointInfo | None = None
    """What it says of the run."""
    step: int = 0
    """Optimizer steps done."""
    samples_consumed: int = 0
    skipped_steps: int = 0
    tokens: int = 0
    mlflow_run_id: str | None = None
    """The MLflow run that goes on, if it is this run's."""
    skipped: tuple[SkippedSamples, ...] = ()
    """What the run skips, in its data or in those of an earlier mixture."""
    rewound: bool = False
    """Whether this process went back there itself, after a spike of the loss."""


def find_start(config: Config) -> Start:
    """Find the checkpoint that `resume` asks for, if there is one, and what it says; collective.

    Raises:
        ValueError: There is no intact checkpoint, or it does not fit the settings.
    """
    path = _checkpoint_to_resume(config)
    return Start() if path is None else _start_at(config, path)


def earlier_start(config: Config, first: int, last: int) -> Start | None:
    """Find the newest intact checkpoint of this run of after steps `first` to `last`, to go back to; collective."""
    paths = broadcast_object(lambda: checkpoint.checkpoints(config.checkpoint_folder))
    for path in reversed([path for path in paths if first <= checkpoint.step_of(path) <= last]):
        problems = checkpoint.verify(path)
        if not problems:
            return _start_at(config, path)
        print_message(f"{path} is damaged: {'; '.join(problems[:3])}; one before it is looked for")
    return None


def _start_at(config: Config, path: Path) -> Start:
    """Return what a checkpoint says, and the record beside it of what its run skips; collective."""
    info = CheckpointInfo.read(path)
    check_resumable(config, path, info)
    recorded = broadcast_object(lambda: checkpoint.read_skipped(path.parent))
    is_own = path.parent.resolve() == config.checkpoint_folder.resolve()  # else it is another run's
    return Start(
        checkpoint=path,
        info=info,
        step=info.step,
        samples_consumed=info.samples_consumed,
        skipped_steps=info.skipped_steps,
        tokens=info.tokens,
        mlflow_run_id=info.mlflow_run_id if is_own else None,
        skipped=tuple(checkpoint.merge_skipped(info.data.skipped, recorded)),
    )


LAUNCH = ".launch"
"""A file in a run's folder: a line for each launcher of its last start, one for SLURM's job (`job 7`, `job 7_2`)."""


def go_on_after_restart(config: Config) -> None:
    """After a restart in place by torchrun, resume the run's own newest checkpoint if it has one; collective.

    The command line is that of the first attempt: `resume` would begin anew, or go back to where that one began. Only
    if that attempt got as far as `record_launch`, the checkpoints are this run's; what was refused is refused again.
    """
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # each machine's agent counts for itself
    found = all_gather_objects((restarted, launcher_watch.launcher()))
    launchers_of_ranks = {launcher for _, launcher in found if launcher}
    if any(again for again, _ in found) and broadcast_object(lambda: _was_begun_by(config, launchers_of_ranks)):
        config.resume = "auto"


def _was_begun_by(config: Config, launchers_of_ranks: set[str]) -> bool:
    try:
        recorded = (config.folder / LAUNCH).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return False
    return not launchers_of_ranks.isdisjoint(recorded) and bool(list(config.checkpoint_folder.glob("step_*[0-9]")))


def record_launch(config: Config) -> None:
    """Record who launched this start, now that all checkpoints in the run's folder are of what goes on; collective.

    Raises:
        OSError: It cannot be written.
    """
    lines = sorted({launcher for launcher in all_gather_objects(launcher_watch.launcher()) if launcher})
    if job := slurm_job():
        lines.append(f"job {job}")
    on_rank_zero(lambda: write_file_atomically(config.folder / LAUNCH, "".join(f"{x}\n" for x in lines).encode()))


def _checkpoint_to_resume(config: Config) -> Path | None:
    if config.resume is None:
        return None
    folder = config.checkpoint_folder if config.resume == "auto" else Path(config.resume)
    if config.resume == "auto" and broadcast_object(lambda: not list(folder.glob("step_*[0-9]"))):
        return None
    return checkpoint.resolve(folder, print_message)


def check_resumable(config: Config, path: Path, info: CheckpointInfo) -> None:
    """Refuse to resume a checkpoint whose parameters, optimizer state or place in the data would not fit.

    Its place means the same samples only in data that are cut and shuffled alike.

    Raises:
        ValueError: They would not fit. The message names the setting that was changed, and how to undo that.
    """
    try:
        old_model = info.model
    except ValueError as error:
        raise ValueError(f"{path}: {error}; resume it with the version of gptoss_dist that wrote it") from None
    for key in SHAPING:
        if (old := getattr(old_model, key)) != (new := getattr(config.model, key)):
            settings = path.parents[1] / "config.yaml"
            whole = f", or begin with --config {settings}" if settings.is_file() else ""
            raise ValueError(
                f"{path} was trained with model.{key}={old}, now it is {new}; give --model.{key} as before{whole}"
            )
    if info.step > config.train.steps:
        raise ValueError(
            f"{path} is at step {info.step} and train.steps={config.train.steps}: nothing is left to train; raise "
            "--train.steps, or resume an earlier checkpoint"
        )
    origin = f"{Path(path) / INFO}: config"
    before = convert(info.config, _Before, origin, remedy="resume it with the version of gptoss_dist that wrote it")
    for key, old, new in (
        ("data.seq_len", before.data.seq_len, config.data.seq_len),
        ("data.packing", before.data.packing, config.data.packing),
        ("run.seed", before.run.seed, config.run.seed),
    ):
        if old != new:
            raise ValueError(
                f"{path} was trained with {key} {printable(old)}, now it is {new}: its place in the data is lost; give "
                f"it as before, --{key} {printable(old)}"
            )
    if before.optim.freeze != config.optim.freeze:
        raise ValueError(
            f"{path} was trained with optim.freeze={before.optim.freeze}, now it is {config.optim.freeze}: the "
            f"optimizer's state does not fit; undo the change, or start a new run with --init.from {path}"
        )


class _Data(msgspec.Struct):
    seq_len: int
    packing: str = "contiguous"


class _Seed(msgspec.Struct):
    seed: int


class _Frozen(msgspec.Struct):
    freeze: list[str]


class _Before(msgspec.Struct):
    """What a resumed run must have in common with the one that wrote the checkpoint."""

    data: _Data
    run: _Seed
    optim: _Frozen


def open_initial_weights(config: Config, start: Start) -> Pretrained | None:
    """Open the weights of `init.from` for a new run; a resumed run has its own.

    Raises:
        ValueError: They cannot be read, or are those of another architecture.
    """
    if start.checkpoint is not None or not config.init["from"]:
        return None
    pretrained = checkpoint.open_pretrained(config.init["from"], message=print_message)
    return checkpoint.check_architecture(pretrained, config.model)


def files_to_carry(start: Start, weights: Pretrained | None) -> dict[str, bytes]:
    """Return the files that each checkpoint of this run keeps from the weights that it began with, by name."""
    if start.checkpoint is not None:
        return checkpoint.companions_to_carry(start.checkpoint)
    return checkpoint.companions_to_carry(weights.folder) if weights is not None else {}


def engine_settings(config: Config) -> EngineSettings:
    """Take out of a run's configuration what its engine reads."""
    sections = {name: getattr(config, name) for name in ("model", "train", "optim", "loss", "parallel", "engine")}
    return EngineSettings(**sections, seed=config.run.seed)


def restore(engine: Engine, start: Start, weights: Pretrained | None, *, seed: int, rank: int) -> None:
    """Put the engine and the random generators into the state that the run starts from; collective.

    A checkpoint gives weights, optimizer state and the random states of the ranks that wrote it; a rank that was not
    among them is seeded anew. `weights` gives weights alone.

    Args:
        engine: The engine.
        start: Where the run starts.
        weights: What a new run takes its weights from, if it is not random ones.
        seed: The seed of the run, for the generators of such a rank.
        rank: This rank.
    """
    if start.checkpoint is not None:
        state = engine.state()
        checkpoint.load_state(start.checkpoint, state)
        engine.load(state)
        if not checkpoint.restore_rng(start.checkpoint, rank):
            seed_everything(seed + start.step, rank)
    elif weights is not None:
        state = engine.state()
        checkpoint.load_into({n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}, weights)
        engine.load(state)


class RunLock:
    """Keeps all other starts out of a run's folders for as long as this one lives. Rank 0 holds it."""

    def __init__(self, config: Config) -> None:
        self._held: dict[Path, Ownership] = {}
        self._stack = ExitStack()
        self._folders = [config.folder.resolve()]
        if not (checkpoints := config.checkpoint_folder.resolve()).is_relative_to(self._folders[0]):
            self._folders.append(checkpoints)

    def take(self) -> list[Path]:
        """Take the folders that exist and are not taken yet, and return these.

        Raises:
            ValueError: Another process has one.
        """
        new = [folder for folder in self._folders if folder.is_dir() and folder not in self._held]
        for folder in new:
            try:
                self._held[folder] = self._stack.enter_context(owned(folder, print_message))
            except BlockingIOError as owner:
                raise ValueError(
                    f"{folder} is in use by {owner}; wait until it has ended, end it, or choose another --run.name"
                ) from None
            except OSError as error:
                raise ValueError(f"{folder} cannot be written ({error.strerror}); choose another --run.dir") from None
        return new

    def check(self) -> None:
        """Raise OSError if a folder is no longer this run's; for rank 0 before it writes a checkpoint."""
        if lost := self.lost():
            raise OSError(lost)

    @property
    def suspects_loss(self) -> bool:
        """Whether a thread has found that another process has taken a folder over; this asks no disk."""
        return any(ownership.lost_to for ownership in self._held.values())

    def lost(self) -> str | None:
        """Look whether the folders are still this run's: a process that was suspended for long was taken for dead.

        Returns:
            None if they are; else a line that says which is not, and whose it is.
        """
        for folder, ownership in self._held.items():
            if owner := ownership.lost():
                return (
                    f"{folder} was taken over by {owner}, while this process gave no sign of life; it ends here and "
                    "saves nothing more, as the other goes on from the last checkpoint"
                )
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def check_folder(config: Config, start: Start) -> None:
    """Refuse to mix two runs in one folder; only rank 0 calls this."""
    folder = config.checkpoint_folder
    is_other = start.checkpoint is None or start.checkpoint.parent.resolve() != folder.resolve()
    if is_other and checkpoint.checkpoints(folder):
        raise ValueError(
            f"checkpoint.dir={config.checkpoint_folder} holds checkpoints already; continue with --resume auto, or "
            "choose another --run.name"
        )


def open_folder(config: Config, lock: RunLock) -> None:
    """Create the run's folder, take it and start log.txt; only rank 0 calls this."""
    folder, checkpoints = config.folder, config.checkpoint_folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.mkdir(parents=True, exist_ok=True)
        new = lock.take()
        for inside in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            remove_unfinished(inside)
        if any(checkpoints.resolve().is_relative_to(taken) for taken in new) and checkpoint.checkpoints(checkpoints):
            raise ValueError(f"{checkpoints}: another start has written checkpoints there meanwhile; start again")
        markers.clear(folder)
        config.save(folder / "config.yaml")
        handler = logging.FileHandler(folder / "log.txt", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be written ({error.strerror}); choose another --run.dir") from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("gptoss_dist")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    if shutil.disk_usage(folder).free < 2**30:
        log.warning("less than 1 GiB is free for %s", folder)


def print_message(text: str) -> None:
    """Tell the user something before there is a log; only rank 0 prints it."""
    if torch.distributed.get_rank() == 0:
        print(f"{launchers.program()}: {printable(text)}", file=sys.stderr)
