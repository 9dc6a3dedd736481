"""`launch/evaluate.py lm-eval`: tasks of the harness on a trained model."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_pipeline.command_line.mistakes import in_words
from data_pipeline.disk import write_file_atomically
from gptoss_dist.distributed.collectives import long_timeout_group, on_rank_zero
from gptoss_dist.evaluation.harness.chat import find_template, require_template
from gptoss_dist.evaluation.harness.tasks import Findings, find_tasks, load_tasks, run_tasks
from gptoss_dist.evaluation.harness.team import Team
from gptoss_dist.evaluation.options import HarnessOptions
from gptoss_dist.evaluation.results import Result, print_table, publish, results_folder
from gptoss_dist.evaluation.subjects import Evaluated, joined, load

SAMPLES = "samples.jsonl"


def evaluate(options: HarnessOptions) -> None:
    """Do what the command line asks for; in several processes, each works on a share of the requests.

    Raises:
        ValueError: The harness is not installed, a task is not known or cannot be loaded, or it does not fit the model.
    """
    with joined(options.device) as ranks:
        group = long_timeout_group() if ranks.world_size > 1 else None
        manager = _find_tasks(options, group)
        evaluated = load(options, ranks)
        team = Team(ranks, evaluated.model, evaluated.tokenizer, options.batch_tokens, group=group, message=_progress)
        if not ranks.is_main:
            team.serve()
            return
        try:
            _run(options, manager, evaluated, team)
        except Exception as error:
            team.end(in_words(error))
            raise
        team.end()


def _find_tasks(options: HarnessOptions, group: dist.ProcessGroup | None) -> Any:
    """Return the harness's manager on rank 0; a mistake is raised on every rank."""
    if group is None:
        return find_tasks(options.tasks, options.include)
    return on_rank_zero(lambda: find_tasks(options.tasks, options.include), group)


def _run(options: HarnessOptions, manager: Any, evaluated: Evaluated, team: Team) -> None:
    with results_folder(options, "lm-eval", evaluated.subject) as folder:  # rank 0 alone is here
        findings, seconds = _measure(options, manager, evaluated, team)
        print_table(findings.rows)
        if options.samples:
            _write_samples(folder, findings)
        publish(_result(options, findings, seconds), evaluated.subject, folder, mlflow=options.mlflow)
        print(f"{seconds:.1f} s; results in {folder}")


def _measure(options: HarnessOptions, manager: Any, evaluated: Evaluated, team: Team) -> tuple[Findings, float]:
    """Return what the tasks found out, and the seconds that they took once they were loaded."""
    from gptoss_dist.evaluation.harness.language_model import HarnessModel

    template = find_template(evaluated.folder, evaluated.tokenizer)
    positions = evaluated.model.config.max_position_embeddings
    evaluated.warn_of_length(options.max_length or positions, team.ranks)
    model = HarnessModel(team, evaluated.tokenizer, max_length=options.max_length or positions, template=template)
    if options.chat:
        require_template(template, evaluated.tokenizer, "chat")
    loaded = load_tasks(manager, options.tasks, options.num_fewshot)
    began = time.monotonic()
    findings = run_tasks(
        model,
        loaded,
        limit=options.limit,
        chat=options.chat,
        system_prompt=options.system_prompt,
        keep_samples=options.samples,
    )
    return findings, time.monotonic() - began


def _result(options: HarnessOptions, findings: Findings, seconds: float) -> Result:
    from lm_eval import __version__

    names = ("tasks", "include", "num_fewshot", "limit", "chat", "system_prompt", "max_length", "precision")
    settings = {name: getattr(options, name) for name in names} | {"lm_eval": __version__}
    metrics = {f"eval/{name}": value for name, value in findings.metrics.items()}
    return Result("lm-eval", settings, findings.rows, metrics, {"versions": findings.versions, "seconds": seconds})


def _write_samples(folder: Path, findings: Findings) -> None:
    lines = [json.dumps(sample, ensure_ascii=False, default=str) for sample in findings.samples]
    write_file_atomically(folder / SAMPLES, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))


def _progress(text: str) -> None:
    print(f"lm-eval: {text}", file=sys.stderr, flush=True)
