"""How many parameters a model has."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gptoss_dist.engine.optimizer import freeze
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.transformer import GptOss


@dataclass(frozen=True)
class ParameterCount:
    """Number of weights; a tied head counts once."""

    total: int
    experts: int
    """The weights of routed experts, which are among these."""
    active: int
    """The weights that one token uses: top-k of the experts; the input embedding only if it is also the head (the
    convention of OpenAI's GPT-OSS model card)."""


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Return the exact counts, from the model built on the meta device."""
    with torch.device("meta"):
        model = GptOss(config)
    total = experts = active = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if ".experts." in name:
            experts += parameter.numel()
            active += parameter.numel() * config.num_experts_per_tok // config.num_local_experts
        elif "embed_tokens" not in name or config.tie_word_embeddings:
            active += parameter.numel()
    return ParameterCount(total, experts, active)


def count_trained(config: ModelConfig, frozen: list[str]) -> int:
    """Return how many weights are trained.

    Args:
        config: The model.
        frozen: Patterns of those that are not, as `optim.freeze`.

    Raises:
        ValueError: A pattern matches none, or nothing is left to train.
    """
    with torch.device("meta"):
        model = GptOss(config)
    freeze(model, frozen)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
