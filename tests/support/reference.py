"""Training written out with stock torch on the unsharded model, for engines to be compared with."""

import contextlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from gptoss_dist.config import Config
from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.engine import Engine, build_engine
from gptoss_dist.engine.optimizer import is_decayed
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.init import initialize
from gptoss_dist.model.losses import balance_loss, z_loss
from gptoss_dist.model.transformer import GptOss
from gptoss_dist.train.objectives import next_token_prediction
from gptoss_dist.train.start import engine_settings

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
}
LR = 1e-3


class Result(NamedTuple):
    """What a short training gave."""

    rows: list[list[float]]
    """Per step: token loss, balance loss, z-loss, gradient norm before clipping."""
    gradients: dict[str, Tensor]
    """Of the first step, before clipping."""
    weights: dict[str, Tensor]
    """After the last step."""


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Everything that names float32 computes in float64: what is left of a difference is no rounding."""
    before = torch.get_default_dtype()
    with patch.object(torch, "float32", torch.float64), patch.object(Tensor, "float", Tensor.double):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def settings(**model) -> Config:
    config = Config(model=ModelConfig(**SIZES | model))
    config.train.precision, config.loss.z_coef = "fp32", 0.001
    return config


def build(config: Config, ranks: Ranks) -> Engine:
    """Build the engine that a training run of these settings has."""
    return build_engine(engine_settings(config), ranks, next_token_prediction)


def micro_batches(step: int, samples: int, length: int = 40, documents: bool = False) -> list[dict[str, Tensor]]:
    """Two micro-batches of `samples` samples each, with different numbers of valid tokens.

    Args:
        length: Tokens of a sample.
        documents: Say where documents end: of lengths from 1 to two thirds of a sample, others in each.
    """
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 101, (2 * samples, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, :25] = -100
    batches = {"input_ids": tokens[:, :-1], "labels": labels}
    if documents:
        ends = torch.randint(1, length, (2 * samples, 3), generator=generator)
        ends[:, 2] = ends[:, 1] + 1
        ends[1] = length  # one sample is one document
        batches["document_ids"] = (torch.arange(length)[:, None] >= ends[:, None]).sum(-1)
    return [dict(zip(batches, parts)) for parts in zip(*(x.chunk(2) for x in batches.values()))]


def plain(
    config: Config, steps: int, samples: int, prepare: Callable[[nn.Module], None] = lambda model: None, **batches
) -> Result:
    """Train the plain model in this process.

    Args:
        prepare: called with the initialised model.
        batches: Further arguments of `micro_batches`.
    """
    model, rows, gradients = GptOss(config.model), [], {}
    initialize(model, config.run.seed)
    prepare(model)
    optim, groups = config.optim, []
    for name, p in model.named_parameters():
        p.requires_grad_(not any(fnmatch(name, pattern) for pattern in optim.freeze))
        scale = [1.0, *(s for pattern, s in optim.lr_scale.items() if fnmatch(name, pattern))][-1]
        groups.append({"params": [p], "weight_decay": optim.weight_decay * is_decayed(name), "lr": LR * scale})
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"][0].requires_grad],
        betas=tuple(config.optim.betas),
        eps=config.optim.eps,
    )
    for step in range(steps):
        parts = micro_batches(step, samples, **batches)
        valid = sum((b["labels"] != -100).sum() for b in parts)
        sums = [0.0, 0.0, 0.0]
        for b in parts:
            token_loss, stats = model(b["input_ids"], b["labels"], document_ids_BT=b.get("document_ids"))
            loss = token_loss / valid
            aux = balance_loss(stats, stats.counts_E, b["input_ids"].numel(), config.model.num_experts_per_tok) / 2
            z = z_loss(stats, b["input_ids"].numel()) / 2
            (loss + config.loss.aux_coef * aux + config.loss.z_coef * z).backward()
            sums = [a + b.item() for a, b in zip(sums, (loss, aux, z))]
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        rows.append([*sums, float(norm)])
    return Result(rows, gradients, {name: p.detach() for name, p in model.named_parameters()})
