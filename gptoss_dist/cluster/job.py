"""What a job is: the options of its submission, the facts of the site, and what follows from both."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_pipeline import command_line
from data_pipeline.command_line import option, parse, ranged

_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")
_WORD = re.compile(r"[\w.,:@+/=&|*\[\]()-]+")
"""What may stand unquoted in a line of `#SBATCH`."""
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_OURS = re.compile(r"--(nodes|ntasks[\w-]*|array|signal|requeue|no-requeue|output|chdir|open-mode)(=.*)?")
"""Options of sbatch that the script sets itself."""


@dataclass
class Site:
    """What a cluster wants of each job: a file of configs/cluster."""

    partition: str | None = None
    """Partition; null takes the cluster's default."""
    account: str | None = None
    """Account that is charged; null takes the user's default."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have, such as "h100"."""
    cpus_per_gpu: int | None = ranged(None, above=0)
    """Processors for each GPU's process; null takes the cluster's default, which often is one for the whole node."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch, such as "--exclusive", "--mem=0", or "--gpus-per-node=h100:8" for one type of GPUs."""
    modules: list[str] = field(default_factory=list)
    """Modules to load, such as "cuda/12.8", in this order, after `module purge`."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that run once, on the first node, before `environment` is set: "export A=$SCRATCH/a", which all
    ranks inherit, or "ulimit -l unlimited"."""
    environment: dict[str, str | int | float | bool] = field(default_factory=dict)
    """Variables to set, such as NCCL_SOCKET_IFNAME. The values are taken as they are, without $VARIABLES."""
    python: str | None = None
    """Python with this project's packages; null is the one that submits, or `python` in a container."""
    container_runtime: Literal["none", "apptainer", "pyxis"] = "none"
    """What starts containers: nothing, Apptainer, or Enroot through SLURM's plugin Pyxis."""
    container_image: str | None = None
    """Image: a file for Apptainer; a file (.sqsh), or REGISTRY#NAME:TAG, for Pyxis."""
    container_mounts: list[str] = field(default_factory=list)
    """Folders to mount, OUTSIDE:INSIDE. This project's and the working directory are mounted anyway."""

    def __post_init__(self) -> None:
        for name in ("partition", "account", "qos", "constraint", "sbatch"):
            _check_words(name, getattr(self, name))
        for line in self.sbatch:
            if not line.startswith("--"):
                raise ValueError(f"sbatch={line!r} is no option of sbatch; give it with its dashes, as --exclusive")
            if _OURS.fullmatch(line):
                raise ValueError(f"sbatch={line!r} is what the script sets itself; leave it out")
        for name, value in self.environment.items():
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"environment={name!r} is no name of a variable; use letters, digits and _")
            if isinstance(value, bool):
                raise ValueError(f'environment.{name}={value} is no text; put it in quotes, as "yes" or "1"')
        self.environment = {name: str(value) for name, value in self.environment.items()}
        for mount in self.container_mounts:
            if "," in mount:
                raise ValueError(f"container_mounts={mount!r} has a comma; give each mount as an entry of its own")
        if self.container_image and self.container_runtime == "none":
            raise ValueError(
                f"container_image={self.container_image} needs container_runtime; set it to apptainer or pyxis"
            )

    @classmethod
    def read(cls, path: str | None) -> Site:
        """Read a file of settings; without one, all are at their defaults.

        Raises:
            ValueError: It cannot be read, or a value is impossible; one line with file, key, value and remedy.
        """
        if path is None:
            return cls()
        try:
            return parse(cls, ["--config", path], prog="a file of configs/cluster")
        except ValueError as error:
            words = str(error).removesuffix("; see a file of configs/cluster --help")
            raise ValueError(f"site={path}: {words}") from None


@dataclass
class JobOptions:
    """Submit a training run to SLURM."""

    site: str | None = None
    """File of the site's facts, such as configs/cluster/apptainer_example.yaml."""
    nodes: int = ranged(1, above=0)
    """Nodes."""
    gpus_per_node: int = ranged(0, at_least=0)
    """GPUs of each node; 0 trains on CPUs."""
    processes_per_node: int | None = ranged(None, above=0)
    """Ranks of each node; null is one for each GPU, or one."""
    time: str | None = None
    """Time limit, as 24:00:00 or 2-12; the job saves and requeues itself before that. Null takes the partition's."""
    partition: str | None = None
    """Partition, instead of the site's."""
    account: str | None = None
    """Account, instead of the site's."""
    qos: str | None = None
    """Quality of service, instead of the site's."""
    container: str | None = None
    """Image of the container, instead of the site's."""
    launcher: Literal["torchrun", "deepspeed"] = "torchrun"
    """What starts the ranks of a node. Either drives either engine."""
    array: list[str] = option(default_factory=list, metavar="KEY=A,B,...")
    """A run for each of the values, such as "optim.lr=1e-3,3e-4"; given twice, for each pair. Each is a run of its own,
    NAME-0, NAME-1, ..., an element of one array of jobs, and nested below one run of MLflow."""
    signal_before_s: int = ranged(300, at_least=60, at_most=65535)
    """Seconds before the time limit at which the job is asked to save; SLURM asks up to a minute earlier."""
    most_stalled_starts: int = ranged(3, above=0)
    """Starts in a row from the same checkpoint, after which the job is not requeued any more."""
    max_restarts: int = ranged(0, at_least=0)
    """Restarts of all ranks in place, by torchrun, before the job counts as failed."""
    follow: bool = False
    """Print the log until the job has ended. Ctrl-C leaves the job as it is."""
    dry_run: bool = False
    """Print the script, and neither write nor submit anything."""

    def __post_init__(self) -> None:
        for name in ("partition", "account", "qos"):
            _check_words(name, getattr(self, name))
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise ValueError(f"time={self.time} is no time limit; give it as 24:00:00, 2-12:00:00, or minutes")
        if self.time is not None and _seconds(self.time) < self.signal_before_s + 120:
            raise ValueError(
                f"time={self.time}: the job would be asked to save at once, as signal_before_s={self.signal_before_s}; "
                "give more time, or a smaller --signal-before-s"
            )
        if self.gpus_per_node and (self.processes_per_node or 0) > self.gpus_per_node:
            raise ValueError(
                f"processes_per_node={self.processes_per_node} is more than gpus_per_node={self.gpus_per_node}; each "
                "rank has a GPU of its own"
            )
        if self.launcher == "deepspeed" and self.max_restarts:
            raise ValueError(f"max_restarts={self.max_restarts} is torchrun's; leave it out with launcher=deepspeed")
        if self.follow and self.array:
            raise ValueError("follow=true is for one job, and array makes several; use tail -F on one of their logs")


def _seconds(time: str) -> int:
    """Return the seconds of a time limit: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    units = (3600, 60, 1) if dash or len(numbers) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(number * unit for number, unit in zip(numbers, units))


def _check_words(name: str, value: str | list[str] | None) -> None:
    for word in [value] if isinstance(value, str) else value or []:
        if not _WORD.fullmatch(word):
            raise ValueError(f"{name}={word!r} cannot stand in a line of #SBATCH; give one word")


_OF_TRAINING = ("config", "model", "resume", "print-config")
"""Options of the training without a dot."""


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the words of a command line that are options of `JobOptions`, and the others: those of the training.

    Args:
        argv: The command line without the program, both kinds of options mixed.

    Raises:
        ValueError: One is nearly an option of `JobOptions`.
    """
    return command_line.split_arguments(argv, JobOptions, _OF_TRAINING)


@dataclass(frozen=True)
class Job:
    """All that the script of a job says."""

    name: str
    """The run's name."""
    folder: Path
    """Where the script, the settings and the logs are kept, from the working directory."""
    options: JobOptions
    site: Site
    elements: int
    """How many runs the array has; 0 is no array."""
    revision: str
    """That of the code, in words."""
    root: Path
    """The project's folder."""
    working_directory: Path
    """Where relative paths of the settings begin."""
    resume: str | None = None
    """`resume` of the settings, which the saved ones leave out."""
    tags: str | None = None
    """Tags for MLflow, as JSON."""

    def __post_init__(self) -> None:
        for what, path in (("run.dir", self.folder), ("the working directory", self.working_directory)):
            if not re.fullmatch(r"[\w.,:@+/=-]+", str(path)):
                raise ValueError(f"{what}={str(path)!r}: SLURM's paths of logs take letters, digits and .,:@+/=- only")
        typed = [line for line in self.site.sbatch if line.startswith("--gpus-per-node=")]
        if typed and typed[-1].rpartition("=")[2].rpartition(":")[2] != str(self.options.gpus_per_node):
            raise ValueError(
                f"gpus_per_node={self.options.gpus_per_node} is not the number in sbatch={typed[-1]!r} of the site; "
                "give the same in --gpus-per-node"
            )
        if self.image and self.site.container_runtime == "none":
            raise ValueError(
                f"container={self.image} needs something that starts containers; set container_runtime in the file of "
                "--site"
            )
        if self.site.container_runtime != "none" and not self.image:
            raise ValueError(
                f"container_runtime={self.site.container_runtime} has no image; give --container IMAGE, or "
                "container_image in the file of --site"
            )

    @property
    def label(self) -> str:
        """The name in SLURM's lists."""
        return re.sub(r"[^\w.=+-]+", "-", self.name)

    @property
    def image(self) -> str | None:
        """The image of the container."""
        return self.options.container or self.site.container_image

    @property
    def python(self) -> str:
        """The Python that runs the training."""
        return self.site.python or (sys.executable if self.site.container_runtime == "none" else "python")

    @property
    def processes_per_node(self) -> int:
        """Ranks on each node."""
        return self.options.processes_per_node or self.options.gpus_per_node or 1

    @property
    def cpus_per_node(self) -> int | None:
        """Processors of each node; None leaves it to the cluster."""
        return self.site.cpus_per_gpu and self.site.cpus_per_gpu * self.processes_per_node

    @property
    def asks_for_processors(self) -> bool:
        """Whether it says how many processors its ranks get; else SLURM's default may be one for each node."""
        words = ("--exclusive", "--cpus", "--mem-per-cpu")
        return bool(self.cpus_per_node) or any(line.startswith(words) for line in self.site.sbatch)

    @property
    def settings(self) -> str:
        """The saved settings, from the working directory; %a is the number of an array's element."""
        return str(self.folder / ("%a.yaml" if self.elements else "config.yaml"))

    @property
    def log(self) -> str:
        """The log, as sbatch wants it: %j is the job, %A_%a that of an element."""
        return str(self.folder / ("%A_%a.log" if self.elements else "%j.log"))
