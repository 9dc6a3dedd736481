"""AdamW over float32 master weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor, nn

from gptoss_dist.config import OptimConfig


def is_decayed(name: str) -> bool:
    """Weight decay acts on matrices that multiply activations: not on norms, biases, sinks or embeddings."""
    module, leaf = name.split(".")[-2:]
    return not ("norm" in module or "bias" in leaf or leaf == "sinks" or module == "embed_tokens")


def parameter_groups(
    model: nn.Module, weight_decay: float, home: Callable[[Tensor], Hashable]
) -> list[tuple[Hashable, dict]]:
    """The optimizer's groups, each with the `home` of its parameters: no group mixes two, nor decayed with others."""
    groups = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((home(parameter), is_decayed(name)), []).append(parameter)
    return [(h, {"params": ps, "weight_decay": weight_decay * decayed}) for (h, decayed), ps in groups.items()]


def adamw(groups: list[dict], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW (arXiv:1711.05101)."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True)


def allocate_state(optimizer: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """Make the state that the first step would make, so that a checkpoint can be loaded into it."""
    for p in parameters:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW for sharded parameters; experts may live on another device mesh than the rest."""
    groups = parameter_groups(model, config.weight_decay, lambda p: getattr(p, "device_mesh", None))
    optimizer = adamw([group for _, group in groups], config)
    allocate_state(optimizer, model.parameters())
    return optimizer
