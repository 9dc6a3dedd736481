"""What is known of a run before its first step: for its tags and its note."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gptoss_dist.config import Config
from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.engine import Engine
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.planner.flops import flops_per_token
from gptoss_dist.planner.hardware import Peak
from gptoss_dist.planner.parameters import ParameterCount, count_parameters
from gptoss_dist.tracking.about.revision import git_revision, source_tags
from gptoss_dist.tracking.about.settings import changed_settings, launch_command, repeated
from gptoss_dist.tracking.recorded.run import flat


@dataclass(frozen=True)
class RunFacts:
    """What a run is, in words and numbers for people."""

    name: str
    folder: Path
    model: str
    parameters: ParameterCount
    data: tuple[tuple[str, float | None], ...]
    """Each source's name, and its share of the tokens when the run began (None if there is one source)."""
    engine: str
    layout: str
    precision: str
    hardware: str
    processes: int
    machines: int
    steps: int
    tokens_per_step: int
    flops_per_token: float
    """Training FLOPs, by `planner.flops.MFU_CONVENTION`."""
    peak: str
    """What the MFU is measured against."""
    revision: str
    sweep: str | None = None
    job: str | None = None
    """Number of the SLURM job."""
    changed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Settings that differ from the defaults, without those of the model."""

    @property
    def node(self) -> str | None:
        """This machine's name in system metrics, if the run has several."""
        return platform.node() if self.machines > 1 else None

    @property
    def devices(self) -> str:
        """How many processes there are, and on what."""
        machines = "1 machine" if self.machines == 1 else f"{self.machines} machines"
        return f"{self.processes} process{'es' * (self.processes > 1)} on {machines}, {self.hardware}"

    @property
    def resume_command(self) -> str:
        """What goes on with the run from its last checkpoint."""
        return f"{self._launch} --resume auto"

    @property
    def repeat_command(self) -> str:
        """What trains the same run again, under another name."""
        return repeated(self._launch, self.name)

    @property
    def _launch(self) -> str:
        return launch_command(self.folder / "config.yaml", self.processes, self.machines)

    def tags(self) -> dict[str, str]:
        """Return the properties by which MLflow groups and filters runs."""
        tags = {
            "model": self.model,
            "model.params": str(self.parameters.total),
            "model.active_params": str(self.parameters.active),
            "data": data_text(self.data),
            "engine": self.engine,
            "layout": self.layout,
            "precision": self.precision,
            "host": platform.node(),
            "hardware": self.hardware,
            "torch": torch.__version__,
            "world_size": str(self.processes),
            "machines": str(self.machines),
            "tokens_per_step": str(self.tokens_per_step),
            "flops_per_token": repr(self.flops_per_token),
            "mfu.peak": self.peak,
            "git.sha": self.revision,
            "run.folder": str(self.folder.absolute()),
        }
        tags |= {"sweep": self.sweep} if self.sweep else {}
        tags |= {"slurm.job_id": self.job} if self.job else {}
        return source_tags() | tags


def facts_of(
    config: Config, ranks: Ranks, engine: Engine, peak: Peak | None, shares: Mapping[str, float] | None = None
) -> RunFacts:
    """Return the facts of a run.

    Args:
        config: Its settings.
        ranks: Its processes.
        engine: What holds its model.
        peak: What the MFU is measured against, if it is known.
        shares: Each source's share of the tokens, by name.
    """
    train, device = config.train, ranks.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU x {os.cpu_count()} cores"
    total = sum((shares or {}).values()) or 1.0
    changed = changed_settings(flat(config.to_dict()), with_model=False)
    named = tuple((name, share / total) for name, share in (shares or {}).items())
    samples = train.micro_batch_size * train.gradient_accumulation * engine.layout.data_parallel
    return RunFacts(
        name=config.run.name,
        folder=config.folder,
        model=model_text(config.model),
        parameters=count_parameters(config.model),
        data=named if len(named) != 1 else ((named[0][0], None),),
        engine=engine.name,
        layout=f"{engine.name} {engine.layout}, dispatch {config.parallel.experts}",
        precision=train.precision,
        hardware=kind,
        processes=ranks.world_size,
        machines=max(1, len(set(ranks.hosts))),
        steps=train.steps,
        tokens_per_step=samples * config.data.seq_len,
        flops_per_token=flops_per_token(config.model, config.data.seq_len).training,
        peak=str(peak) if peak else "unknown",
        revision=git_revision(),
        sweep=_sweep(config.run.name),
        job=slurm_job(),
        changed={key: str(value) for key, (value, _) in changed.items()},
    )


def model_text(config: ModelConfig) -> str:
    """Return an architecture in a few words, such as `4 layers x 256, 8 experts, top 2`."""
    experts = f"{config.num_local_experts} experts, top {config.num_experts_per_tok}"
    return f"{config.num_hidden_layers} layers x {config.hidden_size}, {experts}"


def data_text(data: tuple[tuple[str, float | None], ...], most: int | None = None) -> str:
    """Return sources and their shares, such as `web 70 %, code 30 %`; beyond the first `most`, how many more there are.

    Args:
        data: Their names and shares.
        most: How many are named; None names all.
    """
    named = [name if share is None else f"{name} {100 * share:.3g} %" for name, share in data[:most]]
    return ", ".join(named) + (f" and {len(data) - len(named)} more" if len(data) > len(named) else "")


def slurm_job() -> str | None:
    """Return the number of the SLURM job, `7` or in an array `7_2`, if this is one."""
    env = os.environ
    if array := env.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{env.get('SLURM_ARRAY_TASK_ID')}"
    return env.get("SLURM_JOB_ID")


def _sweep(run_name: str) -> str | None:
    """Return the name that the runs of an array of jobs have in common: `NAME` of `NAME-3` (cluster/sweep.py)."""
    number = os.environ.get("SLURM_ARRAY_TASK_ID")
    return run_name.removesuffix(f"-{number}") if number else None
