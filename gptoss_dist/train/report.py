"""What rank 0 shows and records of a run: metrics, progress, samples and plots."""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from data_pipeline.batches.skipping import SkippedPositions
from data_pipeline.secrets import without_secrets
from gptoss_dist.checkpoint import SkippedSamples
from gptoss_dist.config import Config
from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.engine import Engine, StepResult
from gptoss_dist.planner.flops import flops_per_token
from gptoss_dist.planner.hardware import peak_flops
from gptoss_dist.tracking.about.facts import RunFacts, facts_of
from gptoss_dist.tracking.about.summary import Summary
from gptoss_dist.tracking.delivery.bridges import Bridges
from gptoss_dist.tracking.delivery.requests import NOTE_TAG
from gptoss_dist.tracking.expert_tokens import ExpertTokens
from gptoss_dist.tracking.metrics import (
    Throughput,
    exchange_metrics,
    expert_load,
    loss_metrics,
    memory_metrics,
    mixture_metrics,
)
from gptoss_dist.tracking.pages.run_page import write_in_time
from gptoss_dist.tracking.plots import plot_run
from gptoss_dist.tracking.progress import Progress
from gptoss_dist.tracking.recorded.run import flat
from gptoss_dist.tracking.records import Event
from gptoss_dist.tracking.tracker import Tracker
from gptoss_dist.train.data import TrainingData, sources
from gptoss_dist.train.start import Start

log = logging.getLogger(__name__)

NOTE_S, QUIET_NOTE_S = 30.0, 300.0
"""Seconds between two writings of the run's note, at least, and where nothing happens but steps."""
_CHARTED = ("resume", "rewind", "skipped", "data")
"""Kinds of events that are metrics too: how many there were, as steps of a curve."""
_STATES = {"FINISHED": "finished", "KILLED": "stopped", "FAILED": "failed"}


@dataclass(frozen=True)
class LaunchedStep:
    """An optimizer step whose result is still on its way to the host."""

    step: int
    result: StepResult
    lr: float
    timing: dict[str, float]
    samples_consumed: int


class Report:
    """Rank 0's view of the run. Nothing here can stop training."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        engine: Engine,
        data: TrainingData,
        start: Start,
    ) -> None:
        self.config, self.ranks, self.folder = config, ranks, config.folder
        self.data, self.start_step = data, start.step
        self._position: int | None = None
        self._said: set[str] = set()
        self._rewound, self._process = False, psutil.Process()
        self._validated: tuple[int, float, dict[str, float]] = (-1, 0.0, {})
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.peak = peak_flops(ranks.device, dtype)
        self.flops = flops_per_token(config.model, config.data.seq_len)
        self.facts = facts_of(config, ranks, engine, self.peak, data.mixture.weights)
        self.summary = Summary(self.facts, start.step, start.tokens, start.skipped_steps)
        if start.step:
            self.summary.read_back()
        again = functools.partial(peak_flops, ranks.device, dtype, anew=True)
        self.throughput = Throughput(
            ranks.world_size,
            tokens=start.tokens,
            flops=self.flops,
            peak=self.peak,
            measure_peak=again if ranks.device.type == "cpu" else None,
        )
        self.progress = Progress(config.train.steps, start=start.step, interval_s=config.train.log_every_s)
        self.progress.__enter__()
        self.expert_tokens = ExpertTokens(
            self.folder, config.tracking.expert_tokens_every, start.step or None, self.message
        )
        self.tracker = Tracker(
            self.folder,
            run_name=config.run.name,
            experiment=config.tracking.experiment,
            uri=config.tracking.uri,
            enabled=config.tracking.mlflow,
            params=_params(config, self.facts),
            tags=self.facts.tags() | _routing_tag(config) | _change_tags(data) | self._standing_tags("running"),
            dataset=_dataset(config, data),
            resume_run_id=start.mlflow_run_id,
            resumed_step=start.step or None,
            system_metrics_every_s=config.tracking.system_metrics_every_s,
            node=self.facts.node,
            message=self.message,
        )
        self.bridges = Bridges(self.folder, config.tracking.also, self.message)
        self._noted, self._changed = time.monotonic(), False
        self.revision = self.facts.revision
        self._begin(start)
        self.tracker.artifact(self.folder / "config.yaml")
        if config.train.routing != "learned":
            self.message(f"train.routing={config.train.routing}: a benchmark, the model learns nothing useful")
        if self.peak is None:
            self.message(f"no peak FLOP/s is known for {ranks.device}: MFU is not reported")

    def _begin(self, start: Start) -> None:
        """Record what this process does with the run."""
        if start.checkpoint is None:
            self.event(start.step, "start", f"training begins, {self.facts.devices}")
        elif start.rewound:  # the event is recorded at the step that was given up, whose metrics count no more
            self.tracker.log(start.step, {"events/rewind": self.summary.counts["rewind"]})
        elif start.step < self.config.train.steps:  # a finished run that is started again does nothing more
            self.event(start.step, "resume", f"resumed from {start.checkpoint.name}, {self.facts.devices}")

    def event(self, step: int, kind: str, text: str) -> None:
        """Record that something happened after a step, for the note and the charts of the run.

        Args:
            step: The step.
            kind: One of `records.EVENT_KINDS`.
            text: What happened, in one line.
        """
        text = " ".join(without_secrets(text).split())
        self.tracker.event(step, kind, text)
        count = self.summary.event(Event(time.time(), step, kind, text))
        if kind in _CHARTED:
            if step > 1:
                self.tracker.log(step - 1, {f"events/{kind}": count - 1})
            self.tracker.log(step, {f"events/{kind}": count})
        self._refresh()

    def _refresh(self) -> None:
        """Write the run's note anew, unless that was done a moment ago: then later."""
        self._changed = True
        if time.monotonic() - self._noted >= NOTE_S:
            self._write_note("running")

    def _write_note(self, state: str) -> None:
        self._noted, self._changed = time.monotonic(), False
        try:
            for key, value in self._standing_tags(state).items():
                self.tracker.tag(key, value)
        except Exception as error:  # a note must never end a run
            self._message_once(f"the run's note is not written: {type(error).__name__}: {error}")

    def _standing_tags(self, state: str) -> dict[str, str]:
        """Return what changes while the run trains."""
        tags = {"state": state, NOTE_TAG: self.summary.note(state)}
        if self.summary.best is not None:
            tags["best_val_loss"] = f"{self.summary.best[0]:.4f}"
        elif self.start_step:  # that of an earlier process may be from a step that was given up
            tags["best_val_loss"] = "none yet"
        return tags

    def message(self, text: str) -> None:
        """Write one line to the user and to log.txt."""
        self.progress.message(text)
        log.info(text)

    def _message_once(self, text: str) -> None:
        """Write a line that several drawings would repeat."""
        if text not in self._said:
            self._said.add(text)
            self.message(text)

    def plan(self, position: int, samples_per_step: int) -> None:
        """Tell the user what is read from `position` on, and when that will change."""
        mixture, history = self.data.mixture, self.data.history
        if history and history[-1]["samples"] == position:
            self.message(f"the data changed: {'; '.join(history[-1]['changed'])}")
            self.event(self.start_step, "data", f"the data changed: {'; '.join(history[-1]['changed'])}")
        if len(mixture.sources) > 1:
            self.message(f"data: {mixture.shares(position)}")
        for change, what in mixture.changes:
            if change > position:
                steps = self.data.samples_between(position, change) // samples_per_step
                self.message(f"from step {self.start_step + steps + 1}: {what}")
        self._position = position

    def step(self, launched: LaunchedStep, skipped: int) -> None:
        """Record an optimizer step whose result is on the host.

        Args:
            skipped: Steps that were skipped so far, in all.
        """
        step, result, position = launched.step, launched.result, launched.samples_consumed
        train = self.config.train
        metrics = loss_metrics("train", float(result.loss))
        metrics |= {
            "loss/aux": float(result.aux),
            "loss/z": float(result.z),
            "optim/lr": launched.lr,
            "optim/grad_norm": float(result.grad_norm),
            "optim/skipped_steps": float(skipped),
        }
        metrics |= expert_load(result.counts_LE, result.entropy_L) | launched.timing
        if result.traffic_R3 is not None:
            metrics |= exchange_metrics(result.traffic_R3)
        if train.routing != "learned":
            metrics["moe/forced_routing"] = 1.0
        # Each token, padding included, was sent to K experts in every layer: true of any packing.
        tokens = round(float(result.counts_LE[0].double().sum()) / self.config.model.num_experts_per_tok)
        metrics |= self.throughput.step(tokens, launched.timing)
        if self.throughput.peak != self.peak:
            self.peak = self.throughput.peak
            self.tracker.tag("mfu.peak", str(self.peak))
        metrics |= mixture_metrics(self.data.mixture.usage(position))
        for change, what in self.data.mixture.changes:
            if self._position is not None and self._position <= change < position:
                self.message(f"step {step}: {what}")
                self.event(step, "data", what)
        metrics |= memory_metrics(self.ranks.device, self._process)
        metrics |= self.summary.step(step, metrics)
        if step == 1:  # MLflow would show NaN for what never happens, as if something had failed
            metrics |= {f"events/{kind}": self.summary.counts[kind] for kind in _CHARTED}
        self.tracker.log(step, metrics)
        if result.skipped:
            self._skipped(step, position, metrics)
        self._position = position
        if time.monotonic() - self._noted >= (NOTE_S if self._changed else QUIET_NOTE_S):
            self._write_note("running")
        if warning := self.expert_tokens.add(step, result.counts_LE):
            self.message(warning)
        shown = {"loss": metrics["loss/train"], "tokens_per_s": metrics.get("perf/tokens_per_s"), "lr": launched.lr}
        self.progress.update(step, **{name: value for name, value in shown.items() if value is not None})

    def _skipped(self, step: int, position: int, metrics: dict[str, float]) -> None:
        loss, norm = metrics["loss/train"], metrics["optim/grad_norm"]
        samples = "" if self._position is None else f"; samples {self._position:,} to {position - 1:,} taught nothing"
        self.event(step, "skipped", f"no update: loss {loss:.4g}, gradient norm {norm:.4g}{samples}")

    def validation(self, step: int, loss: float, by_source: dict[str, float]) -> None:
        """Record a validation loss, and that of each source if there are several, and redraw the plots."""
        sources = {f"loss/val_{name}": value for name, value in by_source.items() if len(by_source) > 1}
        metrics = loss_metrics("val", loss) | sources
        metrics |= self.summary.validation(step, loss)
        self._validated = step, self.tracker.log(step, metrics), loss_metrics("val", loss) | sources
        self.message(f"step {step}: validation loss {loss:.4f}, perplexity {metrics['loss/val_ppl']:.2f}")
        self._refresh()
        self.plots()

    def rewound(self, entry: SkippedSamples) -> None:
        """Record that the run goes back, and for what; this report will be closed, and another one opened."""
        self._rewound = True
        self.event(entry["step"], "rewind", in_words(entry))

    def skipping(self) -> None:
        """Record how often the run went back after a spike of the loss, and why and what it skips, if it did."""
        skipped = self.data.skipped
        if not skipped:
            return
        for number, entry in enumerate(skipped, 1):
            self.tracker.tag(f"spike.{number}", in_words(entry))
        samples = 0
        for order in {entry["order"] for entry in skipped}:
            samples += SkippedPositions((s["first"], s["end"]) for s in skipped if s["order"] == order).total
        counts = {"faults/rewinds": float(len(skipped)), "faults/skipped_samples": float(samples)}
        self.tracker.log(self.start_step, counts)

    def saved(self, step: int, pause_s: float) -> None:
        """Record that a checkpoint is being written, and how long the step was held up by that."""
        self.tracker.log(step, {"perf/checkpoint_pause_s": pause_s})
        path = self.config.checkpoint_folder / f"step_{step:08d}"
        validated, at, metrics = self._validated
        if validated == step:
            self.tracker.checkpoint(step, path, metrics, at)
        else:
            self.tracker.checkpoint(step, path, {})
        self.event(step, "checkpoint", f"`{path}`")

    def samples(self, step: int, texts: list[str]) -> None:
        """Keep texts that the model wrote."""
        path = self.folder / "samples" / f"step_{step:08d}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            # Tokens may be cut anywhere: what is no text is written as escapes.
            path.write_text("\n\n----\n\n".join(texts) + "\n", encoding="utf-8", errors="backslashreplace")
            self.tracker.artifact(path, "samples")
        except Exception as error:  # samples must never end a run
            self._message_once(f"samples not written: {error}")
        self.message(f"step {step} sample: {texts[0]!r}")

    def evaluation(self, step: int, metrics: dict[str, float], seconds: float, problem: str = "") -> None:
        """Record what tasks gave, or why they gave nothing.

        Args:
            step: The step after which they were run.
            metrics: `TASK/METRIC` and its value.
            seconds: How long training waited for them.
            problem: Why there are no metrics.
        """
        logged = {f"eval/{name}": value for name, value in metrics.items()}
        self.tracker.log(step, logged | {"perf/evaluation_s": seconds})
        if problem:
            self.message(f"step {step}: no evaluation, {problem[:300]}")
            return
        shown = ", ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:6])
        self.message(f"step {step}: {shown}{', ...' * (len(metrics) > 6)} ({seconds:.1f} s)")

    def page(self, status: str) -> None:
        """Write report.html, beside the run's end: one that takes too long is not waited for.

        Args:
            status: How the run ends: FINISHED, KILLED or FAILED.
        """
        if not self.config.tracking.report or self._rewound:
            return
        words = {"FINISHED": "finished", "KILLED": "stopped as asked", "FAILED": "failed; the reason is in log.txt"}
        # Who is asked to stop may have half a minute, of which saving has had its part.
        timeout_s = 10.0 if status == "KILLED" else 60.0
        written = write_in_time(self.folder, words[status], self._message_once, timeout_s)
        if written is not None:
            self.tracker.artifact(written)
            self.message(f"the run's report is {written}")

    def plots(self) -> None:
        """Draw what metrics.jsonl and expert_tokens.jsonl hold."""
        if not self.config.tracking.plots:
            return
        try:
            for path in plot_run(self.folder, self._message_once):
                self.tracker.artifact(path, "plots")
        except ValueError as error:  # nothing is recorded yet
            log.warning("plots not drawn: %s", error)
        except Exception as error:  # a plot must never end a run
            self._message_once(f"plots not drawn: {error}")

    def close(self, status: Literal["FINISHED", "KILLED", "FAILED"], why: str | None = None) -> None:
        """Finish the tracked run: FINISHED, KILLED or FAILED.

        Args:
            why: What ended it early.
        """
        # First of all: whoever stops the run may kill it while the pictures are drawn.
        self._end(status, why)
        self.tracker.end(status)
        try:
            self.expert_tokens.close()
        except Exception as error:  # reads the device, whose failure may be why the run ends
            log.warning("last row of expert tokens not written: %s", error)
        self.plots()
        self.page(status)
        self.progress.__exit__(None, None, None)
        self.tracker.close(status)
        if self._rewound:  # the other ranks wait for this one
            self.bridges.stop()
        else:
            self.bridges.close()

    def _end(self, status: Literal["FINISHED", "KILLED", "FAILED"], why: str | None) -> None:
        """Record the end of the run, or that it goes back."""
        step = self.summary.last_step
        if not self._rewound:
            kind = {"FINISHED": "end", "KILLED": "stop", "FAILED": "error"}[status]
            self.event(step, kind, f"{_STATES[status]} at step {step}" + (f": {why}" if why else ""))
        for kind in _CHARTED if step else ():  # the curves go on to the last step
            self.tracker.log(step, {f"events/{kind}": self.summary.counts[kind]})
        self._write_note("going back" if self._rewound else _STATES[status])


def in_words(entry: SkippedSamples) -> str:
    """Return a line about samples that are skipped."""
    return (
        f"{entry['reason']}: back to the checkpoint of step {entry['rewound_to']}; samples {entry['first']:,} to "
        f"{entry['end'] - 1:,} of the data are skipped from now on"
    )


def _dataset(config: Config, data: TrainingData) -> dict[str, str]:
    return {
        "name": " + ".join(source.label for source in sources(config.data)),
        "digest": data.mixture.manifest_sha256,
        "source": ", ".join(source.path for source in sources(config.data)),
    }


def _change_tags(data: TrainingData) -> dict[str, str]:
    changes = enumerate(data.history, 1)
    return {f"data.change.{n}": f"step {change['step']}: {'; '.join(change['changed'])}" for n, change in changes}


def _params(config: Config, facts: RunFacts) -> dict[str, object]:
    """Return all settings, those that differ from the defaults first: MLflow shows them in this order."""
    settings = flat(config.to_dict())
    return {key: settings[key] for key in facts.changed} | settings


def _routing_tag(config: Config) -> dict[str, str]:
    routing = config.train.routing
    return {"routing": routing if routing == "learned" else f"{routing} (forced)"}
