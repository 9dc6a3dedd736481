"""Items `502m`, `502m-compiled` and `20b-slice`: what a training step takes, and which kernels take it.

The engine is driven as the training loop drives it, results one step late, on one batch of random tokens: no data are
read, and the router sends them about evenly. Everything else is a real step: forward, loss, backward, clipping, AdamW.
"""

import json
import math
import re
import statistics
import time
from pathlib import Path

import torch

from gptoss_dist.config import Config, load_config
from gptoss_dist.distributed.processes import Ranks, init_distributed, shut_down
from gptoss_dist.engine import Engine, build_engine
from gptoss_dist.planner.flops import MFU_CONVENTION, flops_per_token, mfu
from gptoss_dist.planner.hardware import peak_flops
from gptoss_dist.tracking.metrics import StepTimer
from gptoss_dist.tracking.profiling import profiled
from gptoss_dist.train.objectives import next_token_prediction
from gptoss_dist.train.start import engine_settings
from launch.benchmarks.prove_gpu.findings import ROOT, Findings, run_item

WARM_UP, STEPS = 3, 12
LEARNING_RATE = 1e-4
"""Small enough for steps without a warm-up to learn their one batch."""
LEAST_MFU = {"502m-compiled": 0.2, "20b-slice": 0.2}
"""No figure of a GPU is known yet: below this something is wrong, above it there is something to compare with."""
TINY = {
    "model.vocab_size": 320,
    "model.hidden_size": 32,
    "model.intermediate_size": 32,
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 2,
    "model.head_dim": 8,
    "model.num_hidden_layers": 1,
    "train.micro_batch_size": 2,
    "data.seq_len": 64,
}
KERNEL_LINES = 24
GIB = 2**30


def step_502m(findings: Findings, work: Path) -> None:
    measure(findings, work, "502m", run_502m(findings, {"train.compile": False}))


def step_502m_compiled(findings: Findings, work: Path) -> None:
    measure(findings, work, "502m-compiled", run_502m(findings, {"train.compile": True}))


def slice_20b(findings: Findings, work: Path) -> None:
    measure(findings, work, "20b-slice", run_20b_slice(findings))


def run_502m(findings: Findings, overrides: dict[str, object]) -> Config:
    """Return the 502M run with one micro-batch per step."""
    overrides = {"train.gradient_accumulation": 1} | overrides | (TINY if findings.rehearse else {})
    return load_config(ROOT / "configs/pretrain_502m_a100.yaml", overrides=overrides)


def run_20b_slice(findings: Findings) -> Config:
    """Return a run of two layers of gpt-oss-20b."""
    overrides = {"model": ROOT / "configs/model/gptoss_20b.yaml", "model.num_hidden_layers": 2}
    overrides |= {"data.seq_len": 4096, "train.micro_batch_size": 4}
    return load_config(overrides=overrides | (TINY if findings.rehearse else {}))


def measure(findings: Findings, work: Path, name: str, config: Config) -> None:
    """Build the engine of a run, and report its steps."""
    ranks = init_distributed()
    start = time.perf_counter()
    engine = build_engine(engine_settings(config), ranks, next_token_prediction)
    parameters = sum(p.numel() for p in engine.model.parameters())
    findings.figure("building and filling the model", time.perf_counter() - start, "s", f"{parameters:,} parameters")
    steps = Steps(engine, config, ranks)
    steps.take(1)
    compiling = ", compilation included" if config.train.compile else ""
    findings.figure("the first step", 1e-3 * steps.wall_ms, "s", f"kernels are loaded{compiling}")
    steps.take(WARM_UP - 1)
    report_steps(findings, config, ranks, steps, steps.take(2 if findings.rehearse else STEPS))
    report_rate(findings, config, ranks, steps.wall_ms, LEAST_MFU.get(name, 0.0))
    report_learning(findings, config, steps.losses)
    compare(findings, work, name, steps)
    (work / name).mkdir()
    with profiled(work / name, 1, ranks.device):
        engine.update(engine.forward_backward(steps.batches), LEARNING_RATE)
    report_kernels(findings, work / name)
    shut_down()


class Steps:
    """Takes training steps, and times them."""

    def __init__(self, engine: Engine, config: Config, ranks: Ranks) -> None:
        self.engine, self.config, self.device = engine, config, ranks.device
        self.losses: list[float] = []
        self.skipped = 0.0
        self.median_ms = self.wall_ms = 0.0
        shape = (config.train.micro_batch_size, config.data.seq_len + 1)
        tokens = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        self.batches = [{"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}]

    def take(self, count: int) -> list[dict]:
        """Take steps, and return what the project's own timer said of them; `wall_ms` is their mean on the host."""
        timer, unread, timings = StepTimer(self.device), None, []
        self._synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            timer.start()
            with timer.phase("compute"):
                sums = self.engine.forward_backward(self.batches)
            with timer.phase("optimizer"):
                result = self.engine.update(sums, LEARNING_RATE)
            timings.append(timer.stop())
            self._read(unread)
            unread = result
        self._read(unread)
        self._synchronize()
        self.wall_ms = 1e3 * (time.perf_counter() - begin) / count
        return [timing for timing in timings if timing]

    def _read(self, result) -> None:
        if result is not None:
            result = result.wait()
            self.losses.append(float(result.loss))
            self.skipped += float(result.skipped)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def report_steps(findings: Findings, config: Config, ranks: Ranks, steps: Steps, timings: list[dict]) -> None:
    train = config.train
    every = train.activation_checkpointing
    recomputed = f"1 in {every} blocks recomputed" if every else "no recomputation"
    about = f"{train.micro_batch_size} x {config.data.seq_len} tokens, {train.precision}, {recomputed}"
    findings.figure("step time, mean", steps.wall_ms, "ms", f"{about}; by the host's clock around all steps")
    timed = [timing["perf/step_ms"] for timing in timings]
    if timed:
        steps.median_ms = statistics.median(timed)
        note = f"{min(timed):.1f} to {max(timed):.1f}, by the training loop's own timer"
        findings.figure("step time, median", steps.median_ms, "ms", note)
        # Steps follow each other without a gap: one clock must say about what the other says.
        right = 0.5 < steps.median_ms / steps.wall_ms < 1.5
        findings.check("events and the host's clock agree", right, f"{steps.median_ms:.1f} and {steps.wall_ms:.1f} ms")
    if ranks.device.type == "cuda":
        for name, value in (
            ("peak memory, allocated", torch.cuda.max_memory_allocated()),
            ("peak memory, reserved", torch.cuda.max_memory_reserved()),
        ):
            findings.figure(name, value / GIB, "GiB", "of this process, building the model included")
    else:
        findings.figure("peak memory", None, note="on a GPU only")


def report_rate(findings: Findings, config: Config, ranks: Ranks, step_ms: float, least_mfu: float) -> None:
    rate = 1e3 * config.train.micro_batch_size * config.data.seq_len / step_ms
    findings.figure("tokens/s", rate, "", "one device, by the mean step time")
    flops = flops_per_token(config.model, config.data.seq_len)
    note = f"{MFU_CONVENTION}; {flops.training / 1e9:.3g} GFLOP per token"
    findings.figure("model FLOP/s", flops.training * rate / 1e12, "TFLOP/s", note)
    peak = peak_flops(ranks.device, torch.bfloat16) if ranks.device.type == "cuda" else None
    if peak is None:
        findings.figure("MFU", None, note="no peak is known of this device: a CPU, or a GPU that is not in the table")
        return
    findings.figure("peak", peak.value / 1e12, "TFLOP/s", f"{peak.label}; {peak.source}")
    findings.floor("MFU", mfu(flops, rate, peak), least=least_mfu)
    findings.check("the MFU can be true", mfu(flops, rate, peak) < 1, MFU_CONVENTION)


def report_learning(findings: Findings, config: Config, losses: list[float]) -> None:
    """Check that the steps were those of a model that learns its one batch."""
    finite = all(map(math.isfinite, losses))
    findings.check("all losses are finite", finite, f"{len(losses)} steps")
    model = config.model
    # Logits of random weights are normal, and their variance adds its half to the loss of equal ones. A head that is
    # the embedding takes every token for its own successor, so far as the token's part of the last state goes.
    least = math.log(model.vocab_size) + model.initializer_range**2 * model.hidden_size / 2
    most = least + (model.initializer_range * model.hidden_size if model.tie_word_embeddings else 0.0)
    detail = f"{losses[0]:.3f}, expected {least:.3f} to {most:.3f}"
    findings.check("the first loss is that of random weights", least - 0.3 < losses[0] < most + 0.3, detail)
    findings.check("the loss falls", losses[-1] < losses[0], f"{losses[0]:.4f} to {losses[-1]:.4f} on one batch")


def compare(findings: Findings, work: Path, name: str, steps: Steps) -> None:
    """Compare compiled steps with those that the item before found, if it got that far."""
    findings.check("no step was skipped", steps.skipped == 0, f"{steps.skipped:g} skipped")
    path = work / "step_ms_502m.json"
    if name == "502m":
        path.write_text(json.dumps({"median_ms": steps.median_ms, "losses": steps.losses}))
    elif name == "502m-compiled" and path.exists():
        plain = json.loads(path.read_text())
        difference = max(abs(a - b) / a for a, b in zip(plain["losses"], steps.losses))
        detail = f"losses of the same steps differ by {difference:.1e} at most, bf16"
        findings.check("compiled steps train as plain ones do", difference < 2e-2, detail)
        if steps.median_ms:
            findings.floor("times as fast as not compiled", plain["median_ms"] / steps.median_ms, least=1)


def report_kernels(findings: Findings, folder: Path) -> None:
    """Report the head of the profiler's table; all of it goes to the log."""
    table = next(folder.glob("kernels_*.txt")).read_text()
    print(table)
    findings.text("operators and kernels of one step, by their own time", head_of_table(table))


def head_of_table(table: str) -> str:
    """Return the name, own time, share of it and count of the first rows of a table of torch's profiler."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines() if line.strip() and "---" not in line]
    header = next(row for row in rows if row[0] == "Name")
    place = "CUDA" if "Self CUDA" in header else "CPU"
    columns = [header.index(name) for name in ("Name", f"Self {place}", f"Self {place} %", "# of Calls")]
    whole = [row for row in rows if len(row) == len(header)][:KERNEL_LINES]
    return "\n".join("{:<72}{:>12}{:>14}{:>12}".format(*(row[column][:70] for column in columns)) for row in whole)


if __name__ == "__main__":
    run_item({"502m": step_502m, "502m-compiled": step_502m_compiled, "20b-slice": slice_20b}, __doc__)
