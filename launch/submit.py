#!/usr/bin/env python
"""Submit a training run, or a sweep of several, to SLURM.

    python launch/submit.py --config configs/pretrain_502m_a100.yaml --nodes 8 --gpus-per-node 8 --dry-run
    python launch/submit.py --config configs/quickstart.yaml --site configs/cluster/pyxis_example.yaml --follow
    python launch/submit.py --config configs/quickstart.yaml --array "optim.lr=1e-3,3e-4"

All options that are not of this command are those of launch/train.py. Kept in the run's folder, `job/N/`: the script,
the resolved settings, the revision of the code with a patch of what is not committed, and the log.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main(argv: list[str]) -> int:
    """Do what the command line asks for; return the exit code."""
    from data_pipeline.command_line import MISTAKE, Program, parse
    from data_pipeline.command_line.mistakes import in_words, is_explained
    from gptoss_dist.cluster import JobOptions, split_arguments

    program = Program("submit.py", prefix="submit.py")
    try:
        own, training = split_arguments(argv)
        options = parse(JobOptions, own, prog=program.name, epilog="All other options are those of launch/train.py.")
        return _submit(options, training)
    except KeyboardInterrupt:
        print("submit.py: stopped; no job was submitted", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_explained(error):
            raise
        program.report(in_words(error))
        return MISTAKE


def _submit(options, training: list[str]) -> int:
    """Render, keep, submit, and follow if asked to."""
    from gptoss_dist import cluster
    from gptoss_dist.config import check_named, parse_arguments

    check_named(training)
    base, _ = parse_arguments(training)
    configs = cluster.sweep(training, options.array) if options.array else [base]
    for config in configs:
        cluster.check_submittable(config)
    site, revision = cluster.Site.read(options.site), cluster.read_revision(ROOT)
    job = cluster.Job(
        name=base.run.name,
        folder=cluster.next_folder(base.folder),
        options=options,
        site=site,
        elements=len(configs) if options.array else 0,
        revision=str(revision),
        root=ROOT,
        working_directory=Path.cwd(),
        resume=base.resume,
    )
    for config in configs:
        cluster.check_mounts(job, config)
    if not job.asks_for_processors and options.gpus_per_node:
        print(
            "submit.py: no processors or memory are asked for, and SLURM's default may be one processor for each node; "
            "set cpus_per_gpu, and --exclusive and --mem=0 in sbatch, in the file of --site",
            file=sys.stderr,
        )
    if missing := cluster.missing_data(base):
        print(f"submit.py: NOT READY: {missing}", file=sys.stderr)
    if options.array and base.tracking.mlflow:
        # MLflow is where the job will find it.
        os.environ.update({name: value for name, value in site.environment.items() if name.startswith("MLFLOW_")})
        parent = "(an id, when it is submitted)" if options.dry_run else _parent_run(base, options.array)
        job = dataclasses.replace(job, tags=_tags(parent))
    script = cluster.render(job)
    print(script, end="", flush=True)
    if options.dry_run:
        return 0
    names = [f"{number}.yaml" for number in range(job.elements)] or ["config.yaml"]
    path = cluster.keep(job.folder, script, dict(zip(names, configs)), revision)
    number = cluster.submit(path)
    log = job.log.replace("%j", number).replace("%A", number)
    print(f"submitted job {number}; script and settings in {job.folder}, log in {log}", flush=True)
    if not options.follow:
        return 0
    try:
        state = cluster.follow(number, Path(log), lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print("submit.py: no longer following; the job goes on", file=sys.stderr)
        return 130
    print(f"job {number}: {state}")
    return 0 if state == "COMPLETED" else 1


def _parent_run(config, array: list[str]) -> str | None:
    """Make the MLflow run below which those of a sweep are nested; return its id, or None if MLflow does not answer."""
    from gptoss_dist.tracking.tracker import Tracker

    tracker = Tracker(
        config.folder,
        run_name=config.run.name,
        experiment=config.tracking.experiment,
        uri=config.tracking.uri,
        params={"array": "; ".join(array)},
        tags={"sweep": "; ".join(array)},
        message=lambda text: print(f"submit.py: {text}", file=sys.stderr),
    )
    tracker.close("FINISHED")
    if tracker.run_id is None:
        print("submit.py: MLflow did not answer, so the runs of this sweep will not be nested", file=sys.stderr)
    return tracker.run_id


def _tags(parent: str | None) -> str | None:
    """Return MLFLOW_TAGS for the runs of a sweep: the user's, and the id of the parent."""
    if parent is None:
        return None
    try:
        given = json.loads(os.environ.get("MLFLOW_TAGS") or "{}")
    except ValueError:  # the run says so
        given = {}
    return json.dumps({**given, "mlflow.parentRunId": parent})


if __name__ == "__main__":
    from data_pipeline.command_line.process import accept_any_text

    accept_any_text(restart=True)
    sys.exit(main(sys.argv[1:]))
