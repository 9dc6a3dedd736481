"""The planner's predictions beside what others published: one set of efficiency factors for all rows.

What a published program does otherwise than ours is priced where the trace can be told so, by three facts of the row:
its elementwise operators are fused or not (`PublishedRun.fused`), it recomputes what it says, and DeepEP sends a token
once to every GPU, or node, that needs it. All else that differs is named in the row and left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from gptoss_dist.config import EngineConfig, ParallelConfig, TrainConfig
from gptoss_dist.engine import EngineSettings, Objective
from gptoss_dist.planner.hardware import find_gpu, find_network
from gptoss_dist.planner.timing.kinds import label_of
from gptoss_dist.planner.timing.prices import DatasheetHardware
from gptoss_dist.planner.timing.published import PublishedRun
from gptoss_dist.planner.timing.roofline import StepTime, extrapolate, simulate
from gptoss_dist.planner.tracing.recorder import Operator
from gptoss_dist.planner.tracing.trace import Trace, Workload, trace_step


@dataclass(frozen=True)
class Prediction:
    """A published run and what the planner says of it."""

    run: PublishedRun
    step: StepTime

    @property
    def tokens_per_s(self) -> float:
        """Predicted tokens per second and GPU."""
        return self.step.tokens_per_s(self.run.micro_batch * self.run.accumulation * self.run.seq_len)

    @property
    def ratio(self) -> float:
        """Predicted throughput over the published one."""
        return self.tokens_per_s / self.run.tokens_per_s_per_gpu


def predict_published(run: PublishedRun, objective: Objective) -> Prediction:
    """Return what the planner says of a published run.

    Models of 2 and 4 layers with 1 and 2 micro-batches are traced; both numbers are extrapolated.
    """
    steps = {}
    for micro_batches in (1, 2):
        by_layers = {layers: _simulate(run, layers, micro_batches, objective) for layers in (2, 4)}
        steps[micro_batches] = extrapolate(by_layers[2], by_layers[4], (2, 4), run.model.num_hidden_layers)
    return Prediction(run, extrapolate(steps[1], steps[2], (1, 2), run.accumulation))


def _simulate(run: PublishedRun, layers: int, micro_batches: int, objective: Objective) -> StepTime:
    gpu = find_gpu(run.gpu)
    workload = Workload(run.seq_len, run.gpus, objective, gpu.capability)
    trace = trace_step(settings_of(run, layers, micro_batches), workload)
    if run.deduplicated:
        trace = dataclasses.replace(trace, operators=_sending_once(trace, run))
    hardware = DatasheetHardware(gpu)
    return simulate(trace, hardware, find_network(run.network), run.gpus_per_node, compiled=run.fused)


def settings_of(run: PublishedRun, layers: int, micro_batches: int) -> EngineSettings:
    """Return our settings for a published run, with fewer layers and micro-batches.

    Selective checkpointing that keeps every second product is every second block for us.
    """
    kinds = (run.model.layer_types or [])[:layers]
    model = dataclasses.replace(run.model, num_hidden_layers=layers, layer_types=kinds)
    recompute = {"none": 0, "selective": 2 if run.recomputes_products else 0, "full": 1}[run.recompute]
    return EngineSettings(
        model,
        TrainConfig(
            micro_batch_size=run.micro_batch,
            gradient_accumulation=micro_batches,
            precision="bf16",
            activation_checkpointing=recompute,
        ),
        parallel=ParallelConfig(expert_parallel=run.expert_parallel, replicate=run.replicate),
        engine=EngineConfig() if run.engine == "fsdp" else EngineConfig(kind="deepspeed", zero_stage=1),
    )


def _sending_once(trace: Trace, run: PublishedRun) -> list[Operator]:
    share = _distinct_share(run)

    def once(operator: Operator) -> Operator:
        exchanges_rows = operator.group and label_of(operator) == "all-to-all" and operator.dtype is not None
        return operator._replace(sent=operator.sent * share) if exchanges_rows else operator

    return [once(operator) for operator in trace.operators]


def _distinct_share(run: PublishedRun) -> float:
    """Return how many places of others a token goes to, over how many of its experts are with others.

    Places are GPUs within a node, nodes if there are several: what passes the network is then what takes the time.
    Routing is even, a token's experts are different ones.
    """
    experts, chosen = run.model.num_local_experts, run.model.num_experts_per_tok
    nodes = run.expert_parallel // run.gpus_per_node
    places = nodes if nodes > 1 else run.expert_parallel
    missed = math.comb(experts - experts // places, chosen) / math.comb(experts, chosen)
    return (places - 1) * (1 - missed) / (chosen * (places - 1) / places)


def table(predictions: Iterable[Prediction]) -> str:
    """Return the table of docs/planning_time.md: prediction, figure and ratio of each run."""
    lines = [
        "| run | predicted, tokens/s/GPU | published | predicted / published |",
        "|---|---|---|---|",
    ]
    for prediction in predictions:
        run = prediction.run
        cells = (run.name, f"{prediction.tokens_per_s:,.0f}", f"{run.tokens_per_s_per_gpu:,.0f}")
        lines.append(f"| {' | '.join(cells)} | {prediction.ratio:.2f} |")
    return "\n".join(lines)
