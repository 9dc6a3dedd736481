"""What rank 0 shows and records of a run: metrics, progress, samples and plots."""

from __future__ import annotations

import functools
import logging
import os
import platform
import subprocess
from pathlib import Path

import torch

from data_pipeline import TokenDataset
from gptoss_dist.config import Config
from gptoss_dist.engine import Engine, StepResult
from gptoss_dist.parallel.context import Context
from gptoss_dist.train.expert_tokens import ExpertTokens
from gptoss_dist.train.flops import flops_per_token, peak_flops
from gptoss_dist.train.metrics import Throughput, exchange_metrics, expert_load, loss_metrics, memory_metrics
from gptoss_dist.train.plots import plot_run
from gptoss_dist.train.progress import Progress
from gptoss_dist.train.tracking import Tracker

log = logging.getLogger(__name__)


class Report:
    """Rank 0's view of the run. Nothing here can stop training."""

    def __init__(
        self,
        config: Config,
        context: Context,
        engine: Engine,
        dataset: TokenDataset,
        *,
        start: int,
        tokens: int,
        run_id: str | None,
    ) -> None:
        self.config, self.context, self.folder = config, context, config.folder
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.peak = peak_flops(context.device, dtype)
        self.flops = flops_per_token(config.model, config.data.seq_len)
        self.throughput = Throughput(context.world_size, tokens=tokens, flops=self.flops, peak=self.peak)
        self.expert_tokens = ExpertTokens(self.folder, config.tracking.expert_tokens_every, start or None)
        self.tracker = Tracker(
            self.folder,
            run_name=config.run.name,
            experiment=config.tracking.experiment,
            uri=config.tracking.uri,
            enabled=config.tracking.mlflow,
            params=_flatten(config.to_dict()),
            tags=_tags(config, context, engine, self.peak),
            dataset={
                "name": Path(config.data.path).name,
                "digest": dataset.manifest_sha256,
                "source": config.data.path,
            },
            resume_run_id=run_id,
            resumed_step=start or None,
        )
        self.revision = git_revision()
        self.tracker.artifact(self.folder / "config.yaml")
        self.progress = Progress(config.train.steps, start=start, interval_s=config.train.log_every_s)
        self.progress.__enter__()
        if config.train.routing != "learned":
            self.message(f"train.routing={config.train.routing}: a benchmark, the model learns nothing useful")
        if self.peak is None:
            self.message(f"no peak FLOP/s is known for {context.device}: MFU is not reported")

    def message(self, text: str) -> None:
        """One line to the user and to log.txt."""
        self.progress.message(text)
        log.info(text)

    def step(self, step: int, result: StepResult, lr: float, timing: dict[str, float], skipped: int) -> None:
        """Record optimizer step `step` (1-based); its result has arrived on the host."""
        train = self.config.train
        samples = train.micro_batch_size * train.gradient_accumulation * self.context.world_size
        metrics = loss_metrics("train", float(result.loss))
        metrics |= {
            "loss/aux": float(result.aux),
            "loss/z": float(result.z),
            "optim/lr": lr,
            "optim/grad_norm": float(result.grad_norm),
            "optim/skipped_steps": float(skipped),
        }
        metrics |= expert_load(result.counts_LE, result.entropy_L) | timing
        if result.traffic_R3 is not None:
            metrics |= exchange_metrics(result.traffic_R3)
        if train.routing != "learned":
            metrics["moe/forced_routing"] = 1.0
        metrics |= self.throughput.step(samples * self.config.data.seq_len, timing)
        metrics |= memory_metrics(self.context.device)
        self.tracker.log(step, metrics)
        if warning := self.expert_tokens.add(step, result.counts_LE):
            self.message(warning)
        shown = {"loss": metrics["loss/train"], "tokens_per_s": metrics.get("perf/tokens_per_s"), "lr": lr}
        self.progress.update(step, **{name: value for name, value in shown.items() if value is not None})

    def validation(self, step: int, loss: float) -> None:
        """Record a validation loss and redraw the plots."""
        metrics = loss_metrics("val", loss)
        self.tracker.log(step, metrics)
        self.message(f"step {step}: validation loss {loss:.4f}, perplexity {metrics['loss/val_ppl']:.2f}")
        self.plots()

    def saved(self, step: int, pause_s: float) -> None:
        """Record how long the step was held up by saving."""
        self.tracker.log(step, {"perf/checkpoint_pause_s": pause_s})

    def samples(self, step: int, texts: list[str]) -> None:
        """Keep texts that the model wrote."""
        path = self.folder / "samples" / f"step_{step:08d}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n\n----\n\n".join(texts) + "\n")
            self.tracker.artifact(path, "samples")
        except OSError as error:
            log.warning("samples not written: %s", error)
        self.message(f"step {step} sample: {texts[0]!r}")

    def plots(self) -> None:
        """Draw what metrics.jsonl and expert_tokens.jsonl hold."""
        if not self.config.tracking.plots:
            return
        try:
            for path in plot_run(self.folder):
                self.tracker.artifact(path, "plots")
        except Exception as error:  # a plot must never end a run
            log.warning("plots not drawn: %s", error)

    def close(self, status: str) -> None:
        """Finish the tracked run: FINISHED, KILLED or FAILED."""
        try:
            self.expert_tokens.close()
        except Exception as error:  # reads the device, whose failure may be why the run ends
            log.warning("last row of expert tokens not written: %s", error)
        self.plots()
        self.progress.__exit__(None, None, None)
        self.tracker.close(status)


def _flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _tags(config: Config, context: Context, engine: Engine, peak) -> dict[str, str]:
    device = context.device
    return {
        "git.sha": git_revision(),
        "host": platform.node(),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU x {os.cpu_count()} cores",
        "torch": torch.__version__,
        "world_size": str(context.world_size),
        "layout": f"{engine.name} {engine.layout}, dispatch {config.parallel.experts}",
        "routing": config.train.routing if config.train.routing == "learned" else f"{config.train.routing} (forced)",
        "mfu.peak": str(peak) if peak else "unknown",
    }


@functools.cache
def git_revision() -> str:
    """The commit of this code, with `-dirty` if files differ from it, or `unknown`."""
    try:
        run = subprocess.run(
            ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip() or "unknown"
