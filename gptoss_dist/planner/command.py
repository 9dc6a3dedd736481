"""The command `launch/plan.py`: a plan of a run, or a search for its best layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import psutil

from data_pipeline.command_line import parse, ranged, split_arguments
from data_pipeline.disk import write_file_atomically
from gptoss_dist.config import Config, check_named, parse_arguments
from gptoss_dist.engine import EngineSettings, Objective
from gptoss_dist.planner import report, search
from gptoss_dist.planner.hardware import find_gpu, find_network, gpu_of_driver
from gptoss_dist.planner.plan import Machines, Plan, make_plan
from gptoss_dist.planner.report import GIB

OF_TRAINING = ("config", "model", "resume", "print-config")
"""Options of launch/train.py without a dot."""


@dataclass
class PlanOptions:
    """Say what a run will need on given machines: memory, traffic, step time, cost."""

    gpus: int = ranged(at_least=1)
    """Devices in all."""
    gpu: str | None = None
    """Which ones, such as h100-80gb; an unknown name lists them. Null takes the device of --hardware."""
    nodes: int | None = ranged(None, at_least=1)
    """Machines; null is as few as there can be with 8 devices each."""
    interconnect: str = "ib-400"
    """What joins the machines, such as ib-400 or ethernet-100."""
    hardware: str | None = None
    """A file that `launch/plan.py calibrate` wrote, instead of the datasheet."""
    memory: float | None = ranged(None, above=0)
    """GiB of one device, instead of what the table says; of a CPU null is this machine's, shared by its processes."""
    disk: float = ranged(2.0, above=0)
    """GB/s at which a machine writes checkpoints."""
    in_full: bool = False
    """Trace every layer and micro-batch, instead of as few as tell the rest."""
    json: str | None = None
    """File for the plan as JSON."""
    picture: str | None = None
    """File for a PNG of memory and time over the step; it is traced in full then."""
    search: bool = False
    """Find the best layout for the same global batch, instead of planning the one that is given."""
    search_seconds: float = ranged(35.0, above=0)
    """After so long no further layout is traced; those that were begun get a quarter of a minute more."""
    global_batch: int | None = ranged(None, at_least=1)
    """Samples of a step, of all devices, for --search; null takes those that the settings give."""
    output: str | None = None
    """File for the settings of the best layout, for --search; it must not exist."""


def plan_run(argv: list[str], objective: Objective) -> int:
    """Do what the command line asks for.

    Args:
        argv: The command line without the program.
        objective: What a model is trained for.

    Returns:
        The exit code: 1 if the run, or every layout, would not fit.

    Raises:
        ValueError: An option or a setting is wrong; one line that names it.
    """
    own, training = split_arguments(argv, PlanOptions, OF_TRAINING)
    epilog = "All other options are those of launch/train.py. Verbs: calibrate, operators, published."
    options = parse(PlanOptions, own, prog="plan.py", epilog=epilog)
    check_named(training)
    config, _ = parse_arguments(training)
    machines = machines_of(options)
    _check_files(options)
    settings = EngineSettings(
        config.model, config.train, config.optim, config.loss, config.parallel, config.engine, config.run.seed
    )
    if options.search:
        return _search(options, config, settings, machines, objective)
    plan = make_plan(
        settings,
        config.data.seq_len,
        config.train.steps,
        machines,
        objective,
        documents=config.data.masks_documents,
        in_full=options.in_full or options.picture is not None,
    )
    print(report.to_text(plan))
    _write(options, plan)
    return 0 if plan.fits else 1


def machines_of(options: PlanOptions) -> Machines:
    """Return the machines that the options name.

    Raises:
        ValueError: A name is unknown, or the devices do not fill the machines.
    """
    gpu = None if options.gpu is None else find_gpu(options.gpu)
    together = max(8, gpu.link_gpus) if gpu is not None else 8
    nodes = options.nodes or -(-options.gpus // together)
    if options.gpus % nodes and options.nodes is None:
        raise ValueError(
            f"--gpus {options.gpus} cannot be split over {nodes} machines of at most {together}; give --nodes"
        )
    if options.gpus % nodes:
        raise ValueError(f"--gpus {options.gpus} cannot be split over --nodes {nodes}; name another number of machines")
    network = find_network(options.interconnect)
    hardware, memory = None, None if options.memory is None else GIB * options.memory
    if options.hardware is not None:
        from gptoss_dist.planner.timing.calibration import read_calibration

        hardware = read_calibration(options.hardware)
    elif options.gpu is None:
        raise ValueError(
            "no device is named; give --gpu, such as h100-80gb, or --hardware FILE of a calibrated machine"
        )
    if gpu is None and hardware is not None and hardware.device != "cpu":
        gpu = gpu_of_driver(hardware.device)
        if gpu is None:
            raise ValueError(f"--hardware {options.hardware}: device={hardware.device!r} is unknown; give --gpu too")
    if gpu is None and memory is None:
        memory = psutil.virtual_memory().total / (options.gpus // nodes)
    return Machines(
        options.gpus,
        options.gpus // nodes,
        gpu,
        network if nodes > 1 else None,
        memory_bytes=memory,
        disk_bytes_per_s=1e9 * options.disk,
        hardware=hardware,
    )


def _check_files(options: PlanOptions) -> None:
    """Refuse, before anything is computed, files that could not be written and options that would not be heeded."""
    if not options.search:
        for name, value in (("output", options.output), ("global-batch", options.global_batch)):
            if value is not None:
                raise ValueError(f"--{name} {value} is for a search; add --search")
    if options.search and (options.in_full or options.picture is not None):
        raise ValueError("--in-full and --picture are for one plan; search with --output, and plan that file")
    if options.output is not None and Path(options.output).exists():
        raise ValueError(f"--output {options.output} exists already; name another file")
    for name in ("json", "picture", "output"):
        value = getattr(options, name)
        if value is not None and not Path(value).parent.is_dir():
            raise ValueError(
                f"--{name} {value}: there is no folder {Path(value).parent}; make it, or name another file"
            )


def _search(
    options: PlanOptions, config: Config, settings: EngineSettings, machines: Machines, objective: Objective
) -> int:
    train = config.train
    if machines.gpu is None:
        raise ValueError("--search looks for layouts on GPUs; give --gpu")
    if (degree := config.parallel.context_parallel) > 1:
        raise ValueError(
            f"--search looks for layouts without context parallelism, and parallel.context_parallel={degree}; plan "
            "without --search, or set --parallel.context_parallel 1"
        )
    samples = options.global_batch or train.micro_batch_size * train.gradient_accumulation * machines.devices
    found = search.search(
        settings,
        config.data.seq_len,
        samples,
        train.steps,
        machines,
        objective,
        documents=config.data.masks_documents,
        budget_s=options.search_seconds,
    )
    print(search.to_text(found))
    if not found.best:
        return 1
    best, plan = found.best[0]
    print()
    print(report.to_text(plan))
    _write(options, plan)
    if options.output:
        for section in ("train", "parallel", "engine"):
            setattr(config, section, getattr(best.settings, section))
        config.check()
        config.save(options.output)
        print(f"wrote {options.output}")
    return 0


def _write(options: PlanOptions, plan: Plan) -> None:
    if options.json is not None:
        write_file_atomically(Path(options.json), (json.dumps(report.to_json(plan), indent=2) + "\n").encode())
    if options.picture is not None:
        from gptoss_dist.planner.picture import draw

        draw(plan, Path(options.picture))
