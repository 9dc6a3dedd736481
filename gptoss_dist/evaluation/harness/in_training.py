"""Tasks of the harness while a model trains: all ranks work on them, and none waits longer than the settings say.

    rank 0   thread of the harness     load tasks, make prompts | wait  | wait  | metrics
             training thread           wait                     | round | round | wait   | train
    rank 1   training thread           wait                     | round | round | wait   | train

Only the training threads talk to other ranks. When the time is over, rank 0's lets all of them train on, whatever the
harness does then: its thread is left alone, and its next question is refused. A harness that loads for minutes, from a
network that does not answer for example, so costs one evaluation and not the run. The random numbers that training
draws are as without it; `own_random.py` says how far that holds after the time is over.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline import Tokenizer
from data_pipeline.printable import first_line
from gptoss_dist.config import EvaluationConfig
from gptoss_dist.evaluation.continuing import Continuation
from gptoss_dist.evaluation.harness.chat import carried_template, require_template
from gptoss_dist.evaluation.harness.own_random import own_random_numbers, same_random_numbers
from gptoss_dist.evaluation.harness.tasks import FEWSHOT_SEED, Findings, find_tasks, load_tasks, run_tasks
from gptoss_dist.evaluation.harness.team import Team, TimeIsUp
from gptoss_dist.evaluation.scoring import Request, Score

KEY = "evaluation.tasks"


def check_tasks(config: EvaluationConfig) -> None:
    """Check that the tasks of a run are known; their data are read when they are due.

    Raises:
        ValueError: The harness is not installed, or a name is not known.
    """
    if config.every:
        find_tasks(config.tasks, config.include, KEY)


def check_chat(config: EvaluationConfig, tokenizer: Tokenizer, carried: Mapping[str, bytes]) -> None:
    """Check that there is a chat template if the tasks of a run are to be put into one.

    Args:
        config: Which tasks, and how.
        tokenizer: That of the run's data.
        carried: The files that the run keeps from its first weights, by name.

    Raises:
        ValueError: There is none.
    """
    if config.every and config.chat:
        require_template(carried_template(carried, tokenizer), tokenizer, "evaluation.chat")


@dataclass(frozen=True)
class Outcome:
    """What an evaluation gave, on rank 0."""

    metrics: dict[str, float]
    """`TASK/METRIC`; nothing if it failed."""
    seconds: float
    problem: str = ""
    """Why it failed, in words."""


@dataclass
class TaskEvaluation:
    """The tasks of a run, which are loaded once, when they are due first."""

    config: EvaluationConfig
    _loaded: Any = None
    _thread: threading.Thread | None = None

    def measure(self, team: Team, template: str | None) -> Outcome | None:
        """Run the tasks on a model; collective.

        Args:
            team: The ranks and their model.
            template: The model's chat template, if it has one.

        Returns:
            What they gave, on rank 0.

        Raises:
            Exception: A forward pass failed.
        """
        if not team.ranks.is_main:
            team.serve()
            return None
        began = time.monotonic()
        team.deadline = began + self.config.max_seconds
        try:
            with same_random_numbers(team.ranks.device):
                findings = self._ask_harness(team, template)
        except (TimeIsUp, _HarnessError) as error:
            spent = f"not finished after {self.config.max_seconds:g} s (evaluation.max_seconds)"
            problem = str(error) or spent
            return Outcome({}, time.monotonic() - began, problem)
        finally:
            team.end()
        return Outcome(findings.metrics, time.monotonic() - began)

    def _ask_harness(self, team: Team, template: str | None) -> Findings:
        if self._thread is not None and self._thread.is_alive():
            raise _HarnessError("the harness is still busy with the last one")
        desk = _Desk()
        max_length = team.model.config.max_position_embeddings
        arguments = (desk, team.tokenizer, max_length, template)
        self._thread = threading.Thread(target=self._run, args=arguments, name="harness", daemon=True)
        self._thread.start()
        try:
            for question in desk.questions(team.deadline):
                question.answer(team)
        finally:
            desk.close()
        if isinstance(desk.result, Exception):
            raise _HarnessError(first_line(desk.result)) from desk.result
        assert desk.result is not None, "there are no questions left"
        return desk.result

    def _run(self, desk: _Desk, tokenizer: Tokenizer, max_length: int, template: str | None) -> None:
        """Run the tasks in the harness's thread."""
        try:
            with own_random_numbers(FEWSHOT_SEED):
                desk.finish(self._run_tasks(desk, tokenizer, max_length, template))
        except Exception as error:
            desk.finish(error)

    def _run_tasks(self, desk: _Desk, tokenizer: Tokenizer, max_length: int, template: str | None) -> Findings:
        """Load the tasks if they are not yet, and run them."""
        from gptoss_dist.evaluation.harness.language_model import HarnessModel

        config = self.config
        if self._loaded is None:
            manager = find_tasks(config.tasks, config.include, KEY)
            self._loaded = load_tasks(manager, config.tasks, config.num_fewshot)
        model = HarnessModel(desk, tokenizer, max_length=max_length, template=template)
        return run_tasks(model, self._loaded, limit=config.limit, chat=config.chat, with_errors=False)


class _HarnessError(Exception):
    """The harness failed, outside of the model."""


@dataclass
class _Question:
    """What the harness's thread wants to know of the model."""

    ask: Callable[[Team], Any]
    found: threading.Event = field(default_factory=threading.Event)
    result: Any = None

    def answer(self, team: Team) -> None:
        self.result = self.ask(team)
        self.found.set()


class _Desk:
    """Where the harness's thread asks, and the training thread answers."""

    def __init__(self) -> None:
        self.result: Findings | Exception | None = None
        self._questions: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self._closed = threading.Event()

    # The harness's thread --------------------------------------------------------------------------------------------

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Return the score of each request."""
        return self._ask(lambda team: team.score(requests))

    def continue_prompts(self, continuations: Sequence[Continuation]) -> list[list[int]]:
        """Return the new tokens of each prompt."""
        return self._ask(lambda team: team.continue_prompts(continuations))

    def _ask(self, ask: Callable[[Team], Any]) -> Any:
        question = _Question(ask)
        self._questions.put(question)
        while not question.found.wait(0.5):
            if self._closed.is_set():
                raise TimeIsUp
        return question.result

    def finish(self, result: Findings | Exception) -> None:
        """Hand over how it ended."""
        self.result = result
        self._questions.put(None)

    # The training thread ---------------------------------------------------------------------------------------------

    def questions(self, deadline: float) -> Iterator[_Question]:
        """Yield questions until the harness has ended.

        Raises:
            TimeIsUp: It has not when the deadline passes.
        """
        while True:
            try:
                question = self._questions.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeIsUp from None
            if question is None:
                return
            yield question

    def close(self) -> None:
        """Answer nothing more."""
        self._closed.set()
