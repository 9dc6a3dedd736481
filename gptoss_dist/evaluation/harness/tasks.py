"""Tasks of the harness: found by name, loaded, and run on a model; only rank 0 does this."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data_pipeline.command_line.mistakes import suggestion
from data_pipeline.printable import first_line

FEWSHOT_SEED = 1234
"""The harness's own default: the examples in a prompt are the same for every model."""
_FILTERS_UNNAMED = "none"


def require_harness(key: str) -> None:
    """Check that the harness is installed.

    Args:
        key: The setting that asks for it.

    Raises:
        ValueError: It is not.
    """
    missing = [name for name in ("lm_eval", "transformers") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{key} needs {' and '.join(missing)}, which is not installed: sh launch/install.sh --extras eval"
        )


@dataclass(frozen=True)
class Findings:
    """What tasks found out of a model."""

    rows: list[dict[str, Any]]
    """A line for each metric of each task and group."""
    metrics: dict[str, float]
    """`TASK/METRIC`, with `.FILTER` behind if the answers were filtered."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Each document with its requests and answers."""
    versions: dict[str, Any] = field(default_factory=dict)
    """Of the tasks."""


def find_tasks(names: Sequence[str], include: str | None, key: str = "tasks") -> Any:
    """Return a manager of the harness that knows all `names`.

    Args:
        names: Tasks, groups, tags, or YAML files.
        include: A folder of further tasks.
        key: The setting that names them.

    Raises:
        ValueError: The harness is not installed, or a name is not known.
    """
    require_harness(key)
    from lm_eval.tasks import TaskManager

    if include is not None and not Path(include).is_dir():
        raise ValueError(f"include={include} is no folder of task files; give one, or leave it out")
    # Thousands of files come with the harness: they are read only if the names are not among the user's own.
    manager = TaskManager(include_path=include, include_defaults=False)
    if unknown := _unknown(names, manager):
        manager = TaskManager(include_path=include)
        unknown = _unknown(names, manager)
    if unknown:
        where = f"in {include} nor among the {len(manager.all_tasks):,} tasks of lm_eval" if include else "of lm_eval"
        raise ValueError(
            f"{key}={unknown[0]} is no task {where}{suggestion(unknown[0], manager.all_tasks)}; give a name, a YAML "
            "file, or the folder of its file with include"
        )
    return manager


def _unknown(names: Sequence[str], manager: Any) -> list[str]:
    known = set(manager.all_tasks)
    return [n for n in names if n not in known and not (n.endswith((".yaml", ".yml")) and Path(n).is_file())]


def load_tasks(manager: Any, names: Sequence[str], num_fewshot: int | None) -> Any:
    """Read the data of tasks.

    Args:
        manager: From `find_tasks`.
        names: Which.
        num_fewshot: Examples in each prompt; None is what a task says. A task that says 0 keeps it, as in the harness.

    Returns:
        What `run_tasks` takes.

    Raises:
        ValueError: Data or definition cannot be read, or a task wants texts written in a way that there is not here.
    """
    from gptoss_dist.evaluation.harness.generation_kwargs import read

    with quiet():
        try:
            loaded = manager.load(list(names))
        except Exception as error:  # tasks are other people's programs, and their data anywhere
            raise ValueError(f"tasks={' '.join(names)} cannot be loaded: {first_line(error)}") from error
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE == "generate_until":
            read(task.get_config("generation_kwargs") or {}, name)  # now, and not after hours of other tasks
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def run_tasks(
    model: Any,
    loaded: Any,
    *,
    limit: int | None = None,
    chat: bool = False,
    system_prompt: str | None = None,
    keep_samples: bool = False,
    with_errors: bool = True,
) -> Findings:
    """Run tasks on a model.

    Args:
        model: A `HarnessModel`.
        loaded: From `load_tasks`.
        limit: Documents of each task; None is all.
        chat: Put prompts into the chat template.
        system_prompt: What the system says first in a chat.
        keep_samples: Return each document with its answers.
        with_errors: Estimate the standard error of metrics that are no mean, by resampling.
    """
    from lm_eval import evaluator

    with quiet(), templates_compiled_once():
        results = evaluator.evaluate(
            lm=model,
            task_dict=loaded,
            limit=limit,
            log_samples=keep_samples,
            bootstrap_iters=100_000 if with_errors else 0,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            system_instruction=system_prompt,
        )
    rows = list(_rows(results))
    samples = [{"task": task, **sample} for task, found in results.get("samples", {}).items() for sample in found]
    return Findings(rows, {_metric_name(row): row["value"] for row in rows}, samples, dict(results["versions"]))


def _rows(results: Any) -> Iterator[dict[str, Any]]:
    groups = {name: found for name, found in results.get("groups", {}).items() if name not in results["results"]}
    for task, found in [*results["results"].items(), *groups.items()]:
        counts = results["n-samples"].get(task, {})
        for key, value in found.items():
            metric, _, filter_ = key.partition(",")
            if not filter_ or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = found.get(f"{metric}_stderr,{filter_}")
            yield {
                "task": task,
                "metric": metric,
                "filter": filter_,
                "value": float(value),
                "stderr": float(error) if isinstance(error, (int, float)) else None,
                "documents": counts.get("effective"),
                "shots": results["n-shot"].get(task),
            }


def _metric_name(row: dict[str, Any]) -> str:
    filtered = "" if row["filter"] == _FILTERS_UNNAMED else f".{row['filter']}"
    return re.sub(r"[^\w\-. :/]", "_", f"{row['task']}/{row['metric']}{filtered}")


@contextmanager
def templates_compiled_once() -> Iterator[None]:
    """Keep the templates that the harness compiles: it compiles those of a task anew for each document, 4 ms each."""
    from lm_eval import utils

    environment = getattr(utils, "env", None)
    if environment is None or "from_string" in vars(environment):  # another version; another evaluation in this process
        yield
        return
    environment.from_string = functools.lru_cache(maxsize=256)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out progress bars and notices of the harness and of `datasets`, which every request would write."""
    import datasets
    from lm_eval.api import task

    def unchanged(iterable: Any, *args: Any, **kwargs: Any) -> Any:
        return iterable

    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "datasets")}
    bar, had_bars = getattr(task, "tqdm", None), not datasets.are_progress_bars_disabled()
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    task.tqdm = unchanged
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        task.tqdm = bar
        if had_bars:
            datasets.enable_progress_bars()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
