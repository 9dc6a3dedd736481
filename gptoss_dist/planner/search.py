"""The best layouts of a model on given machines, for a fixed global batch.

Every combination of replicate, shard and expert parallel degrees, micro-batch, checkpointing and engine is estimated
(`estimates.py`), and the most promising are traced (`plan.py`) until there are enough, or the time is over. The best
are printed as they were traced; of those that do not fit, most are refused by their estimate.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Self

import torch

from gptoss_dist.config import EngineConfig
from gptoss_dist.distributed.collectives import LocalError
from gptoss_dist.engine import EngineSettings, Objective, engine_kind
from gptoss_dist.engine.zero_settings import zero_stage
from gptoss_dist.parallel.mesh import DeviceLayout, plan_layout
from gptoss_dist.planner.estimates import Estimator, unit_settings
from gptoss_dist.planner.plan import Machines, Plan, make_plan

CHECKPOINTING = (0, 2, 1)
"""Choices of `train.activation_checkpointing`."""
LARGEST_MICRO_BATCH = 64
TRACED_PER_WANTED = 2
"""Layouts that fit are traced until there are so many for each that is wanted."""
SLACK = {"fsdp": 1.03, "deepspeed": 1.25}
"""An estimate of memory that is above the limit by less is traced all the same: by so much estimates were wrong."""
GRACE_S = 15.0
"""Seconds after the deadline in which a trace that was begun may end."""
LONGEST_S = 120.0
"""Seconds in which the first traces have to end."""


@dataclass(frozen=True)
class Candidate:
    """One layout, and what it is estimated to need."""

    settings: EngineSettings
    layout: DeviceLayout
    memory: float
    """Bytes, margin included."""
    seconds: float

    @property
    def family(self) -> tuple:
        """What it shares with those that differ in batch and checkpointing only."""
        return self.settings.engine.zero_stage, self.settings.parallel.reshard_after_forward, self.layout

    @property
    def words(self) -> str:
        """What is particular about it."""
        train, layout = self.settings.train, self.layout
        engine = "fsdp" if self.settings.parallel.reshard_after_forward else "fsdp, gathered"
        if engine_kind(self.settings.engine) == "deepspeed":
            engine = f"ZeRO-{zero_stage(self.settings.engine)}"
        return (
            f"{engine:<15}{layout.replicate:>4} x {layout.shard:<5}{layout.expert_parallel:>3}   "
            f"{train.micro_batch_size:>3} x {train.gradient_accumulation:<4}{train.activation_checkpointing:>3}"
        )


@dataclass(frozen=True)
class Found:
    """What a search found."""

    best: list[tuple[Candidate, Plan]]
    """Those that fit, the fastest first."""
    refused: list[tuple[Candidate, str]]
    """Those that are estimated to be as fast or faster, and why not."""
    candidates: int
    """How many there are."""
    traced: int
    ended_early: bool
    """Whether the time was over before enough were traced."""


def search(
    settings: EngineSettings,
    seq_len: int,
    samples: int,
    steps: int,
    machines: Machines,
    objective: Objective,
    *,
    documents: bool = False,
    wanted: int = 10,
    budget_s: float = 35.0,
) -> Found:
    """Find the fastest layouts that fit.

    Args:
        settings: Model, precision, compile and whatever else is not searched for.
        seq_len: Tokens of a sample.
        samples: Of the global batch, which all layouts share.
        steps: Of the run.
        machines: What is planned for, GPUs.
        objective: What the model is trained for.
        documents: Whether attention stays within documents.
        wanted: How many to return.
        budget_s: Seconds after which no further one is traced; at least one is.

    Raises:
        ValueError: The batch cannot be split over the devices.
    """
    started = time.monotonic()
    if samples % machines.devices:
        raise ValueError(
            f"a global batch of {samples} samples cannot be split over {machines.devices} devices; "
            "give --global-batch a multiple"
        )
    limit = machines.limit
    assert limit is not None, "a search needs to know the device's memory"
    best: list[tuple[Candidate, Plan]] = []
    with _Tracers(seq_len, steps, objective, documents) as tracers:
        candidates = _candidates(settings, samples // machines.devices, machines, tracers)
        hopeless = [c for c in candidates if c.memory > SLACK[engine_kind(c.settings.engine)] * limit]
        promising = _by_turns([c for c in candidates if c.memory <= SLACK[engine_kind(c.settings.engine)] * limit])
        refused = [(c, _too_much(c.memory, limit, "estimated")) for c in hopeless]
        traced = 0
        for candidate, plan in tracers.plans(promising, machines, started + budget_s):
            traced += 1
            if isinstance(plan, str):
                refused.append((candidate, plan))
            elif not plan.fits:
                refused.append((candidate, _too_much(plan.needed, limit, "traced")))
            else:
                best.append((candidate, plan))
            if len(best) >= TRACED_PER_WANTED * wanted:
                break
    best.sort(key=lambda found: found[1].time.seconds if found[1].time is not None else float("inf"))
    slowest = max((plan.time.seconds for _, plan in best[:wanted] if plan.time is not None), default=float("inf"))
    refused = sorted((r for r in refused if r[0].seconds <= slowest), key=lambda refusal: refusal[0].seconds)
    early = len(best) < TRACED_PER_WANTED * wanted and traced < len(promising)
    return Found(best[:wanted], refused, len(candidates), traced, early)


def _candidates(settings: EngineSettings, samples: int, machines: Machines, tracers: _Tracers) -> list[Candidate]:
    """Return all layouts with their estimates, the fastest first; `samples` are those of one device in a step."""
    alone = dataclasses.replace(machines, devices=1, node_size=1, network=None)
    units = [tracers.begin(unit, alone) for unit in unit_settings(settings)]
    estimator = Estimator(machines, [unit.result() for unit in units])
    estimated = [_estimated(choice, estimator, machines) for choice in layouts(settings, samples, machines)]
    return sorted(estimated, key=lambda candidate: candidate.seconds)


class _Tracers:
    """Processes that trace, one for each core; a process can be in one made-up world at a time."""

    def __init__(self, seq_len: int, steps: int, objective: Objective, documents: bool) -> None:
        self.seq_len, self.steps, self.objective, self.documents = seq_len, steps, objective, documents

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([make_plan.__module__])  # once for all, which takes seconds
        self.workers = max(1, min(8, len(os.sched_getaffinity(0))))
        self.others = set(multiprocessing.active_children())
        self.pool = ProcessPoolExecutor(self.workers, context)
        return self

    def __exit__(self, *error) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - self.others:
            process.terminate()

    def begin(self, settings: EngineSettings, machines: Machines) -> Future:
        """Begin to trace; the result is a plan, or a ValueError."""
        return self.pool.submit(_plan, settings, self.seq_len, self.steps, machines, self.objective, self.documents)

    def plans(
        self, candidates: Iterable[Candidate], machines: Machines, deadline: float
    ) -> Iterator[tuple[Candidate, Plan | str]]:
        """Trace candidates in order, and return each with its plan, or why it is impossible.

        But for the first ones, none is begun after the deadline, a time of `time.monotonic`.
        """
        waiting, running = iter(candidates), dict[Future, Candidate]()
        begun = 0
        while True:
            while len(running) < self.workers and (begun < self.workers or time.monotonic() < deadline):
                if (candidate := next(waiting, None)) is None:
                    break
                running[self.begin(candidate.settings, machines)] = candidate
                begun += 1
            if not running:
                return
            patience = LONGEST_S if begun <= self.workers else max(0.0, deadline + GRACE_S - time.monotonic())
            done = wait(running, patience, FIRST_COMPLETED).done
            if not done:
                return
            for job in done:
                candidate = running.pop(job)
                try:
                    plan: Plan | str = job.result()
                except ValueError as error:
                    plan = str(error)
                except BrokenProcessPool as error:
                    raise LocalError(f"a process that traced ended by itself ({error}); is memory short?") from error
                yield candidate, plan


def _plan(
    settings: EngineSettings, seq_len: int, steps: int, machines: Machines, objective: Objective, documents: bool
) -> Plan:
    torch.set_num_threads(1)
    return make_plan(settings, seq_len, steps, machines, objective, documents=documents)


def _by_turns(candidates: list[Candidate]) -> list[Candidate]:
    """Return candidates in the order in which they are traced: the first of each family, then the second ones, ..."""
    turns: list[tuple[int, int]] = []
    seen: Counter[tuple] = Counter()
    for index, candidate in enumerate(candidates):
        turns.append((seen[candidate.family], index))
        seen[candidate.family] += 1
    return [candidates[index] for _, index in sorted(turns)]


def layouts(
    settings: EngineSettings, samples: int, machines: Machines
) -> Iterator[tuple[EngineSettings, DeviceLayout]]:
    """Return all that is searched through.

    Args:
        settings: What is the same everywhere.
        samples: Of a step on one device.
        machines: How many devices there are.
    """
    engines = [
        *((EngineConfig(kind="fsdp"), reshard) for reshard in (True, False)),
        *((EngineConfig(kind="deepspeed", zero_stage=stage), True) for stage in (1, 2, 3)),
    ]
    micro_batches = [n for n in range(1, min(samples, LARGEST_MICRO_BATCH) + 1) if samples % n == 0]
    experts = settings.model.num_local_experts
    for engine, reshard in engines:
        for replicate in _divisors(machines.devices) if engine.kind == "fsdp" else [1]:
            shard = machines.devices // replicate
            degrees = [n for n in _divisors(shard) if experts % n == 0] if settings.parallel.experts != "plain" else [1]
            for expert_parallel in degrees:
                parallel = dataclasses.replace(
                    settings.parallel,
                    replicate=replicate,
                    expert_parallel=expert_parallel,
                    reshard_after_forward=reshard,
                )
                layout = plan_layout(parallel, experts, machines.devices, machines.node_size)
                for micro_batch in micro_batches:
                    for every in CHECKPOINTING:
                        train = dataclasses.replace(
                            settings.train,
                            micro_batch_size=micro_batch,
                            gradient_accumulation=samples // micro_batch,
                            activation_checkpointing=every,
                        )
                        yield dataclasses.replace(settings, train=train, parallel=parallel, engine=engine), layout


def _estimated(choice: tuple[EngineSettings, DeviceLayout], estimator: Estimator, machines: Machines) -> Candidate:
    settings, layout = choice
    peak = estimator.memory(settings, layout)
    return Candidate(settings, layout, peak + machines.margin.of(peak), estimator.seconds(settings, layout))


def _too_much(needed: float, limit: float, how: str) -> str:
    return f"needs {needed / 2**30:.1f} of {limit / 2**30:.1f} GiB ({how})"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


HEADER = "  engine         repl x shard  ep   batch     ckpt"


def to_text(found: Found, refused: int = 5) -> str:
    """Return the best layouts and why the next ones do not fit, as text.

    Args:
        found: What was found.
        refused: How many of those that do not fit to name.
    """
    lines = [
        f"search       {found.candidates:,} layouts estimated, {found.traced} traced",
        HEADER + "   s/step  tokens/s/device    GiB",
    ]
    for candidate, plan in found.best:
        assert plan.time is not None
        rate = plan.time.tokens_per_s(plan.tokens_per_device)
        lines.append(f"  {candidate.words}{plan.time.seconds:>10.3f}{rate:>17,.0f}{plan.needed / 2**30:>7.1f}")
    if not found.best:
        lines.append("  none of those that were traced fits")
    if found.ended_early:
        lines.append("the time was over: with more --search-seconds, or more cores, there may be better ones")
    if found.refused:
        lines.append("would not fit")
    lines += [f"  {candidate.words}   {why}" for candidate, why in found.refused[:refused]]
    return "\n".join(lines)
