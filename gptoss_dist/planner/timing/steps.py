"""Real training steps, timed in a process of their own: what predictions are compared with."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing as mp

from data_pipeline.disk import write_file_atomically
from data_pipeline.foreign import read_json
from gptoss_dist.distributed.processes import init_distributed
from gptoss_dist.engine import EngineSettings, Objective, build_engine
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.planner.timing.calibration import Calibration
from gptoss_dist.planner.timing.roofline import StepTime, simulate
from gptoss_dist.planner.tracing.trace import Workload, trace_step


@dataclass(frozen=True)
class Measured:
    """Seconds of training steps."""

    wall: list[float]
    processor: list[float]
    """Of all threads of the process together."""
    product_s: float
    """Of a product of square matrices of 512, between the steps: how fast the machine is just now."""

    def seconds(self, threads: int) -> float:
        """Return the median: of one thread the processor's seconds, which others on the machine hardly change."""
        return statistics.median(self.processor if threads == 1 else self.wall)


TINY = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    num_local_experts=4,
    num_experts_per_tok=2,
    rope_scaling=None,
)
"""A model whose operators are so small that a step is what they cost the host."""
TINY_TOKENS = 32


def with_operator_s(calibration: Calibration, objective: Objective) -> Calibration:
    """Return a calibration with `operator_s`: what a real step of a tiny model takes beyond its work, per kernel."""
    settings = EngineSettings(TINY)
    settings.train.micro_batch_size, settings.train.precision = 1, "fp32"
    device = torch.device("cpu" if calibration.device == "cpu" else "cuda")
    measured = measure_steps(settings, TINY_TOKENS, objective, device, calibration.threads, steps=20)
    without = dataclasses.replace(calibration, operator_s=0.0)
    work = predict_step(settings, TINY_TOKENS, objective, without)
    left = measured.seconds(calibration.threads) - work.seconds
    return dataclasses.replace(calibration, operator_s=max(left, 0.0) / work.kernels)


def predict_step(settings: EngineSettings, seq_len: int, objective: Objective, calibration: Calibration) -> StepTime:
    """Return the step of one process by itself on a calibrated machine."""
    capability = None if calibration.device == "cpu" else torch.cuda.get_device_capability()
    trace = trace_step(settings, Workload(seq_len, 1, objective, capability))
    return simulate(trace, calibration, compiled=settings.train.compile)


def measure_steps(
    settings: EngineSettings,
    seq_len: int,
    objective: Objective,
    device: torch.device,
    threads: int,
    steps: int = 5,
) -> Measured:
    """Train some steps on random tokens with the real engine, in a process of its own.

    Args:
        settings: What the engine reads of the configuration.
        seq_len: Tokens per sample.
        objective: A function of a module, which the other process can import.
        device: The CPU, or the CUDA device that is used.
        threads: CPU threads of the process.
        steps: How many are timed, after two that warm up.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_train, (settings, seq_len, objective, device.type, threads, steps, folder), nprocs=1)
        return read_json(Path(folder) / "found.json", Measured)


def _train(_, settings, seq_len, objective, device_type, threads, steps, folder) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    ranks = init_distributed()
    engine = build_engine(settings, ranks, objective)
    shape = (settings.train.micro_batch_size, seq_len + 1)
    tokens = torch.randint(0, settings.model.vocab_size, shape, device=ranks.device)
    batch = {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    batches = [batch] * settings.train.gradient_accumulation
    wall, processor, products = [], [], []
    for _ in range(steps + 2):
        products.append(_product_s(ranks.device))
        begin, begin_processor = time.perf_counter(), time.process_time()
        engine.update(engine.forward_backward(batches), 1e-4)
        if device_type == "cuda":
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - begin)
        processor.append(time.process_time() - begin_processor)
    found = Measured(wall[2:], processor[2:], statistics.median(products[2:]))
    write_file_atomically(Path(folder) / "found.json", json.dumps(dataclasses.asdict(found)).encode())


def _product_s(device: torch.device, size: int = 512) -> float:
    a = torch.ones(size, size, device=device)
    begin = time.process_time()
    torch.mm(a, a)
    return time.process_time() - begin
