"""AdamW over sharded float32 master weights."""

from __future__ import annotations

import torch
from torch import nn

from gptoss_dist.config import OptimConfig


def is_decayed(name: str) -> bool:
    """Weight decay acts on matrices that multiply activations: not on norms, biases, sinks or embeddings."""
    module, leaf = name.split(".")[-2:]
    return not ("norm" in module or "bias" in leaf or leaf == "sinks" or module == "embed_tokens")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW (arXiv:1711.05101) with its state already allocated, so that a checkpoint can be loaded into it.

    Experts may live on another device mesh than the rest: no group mixes the two.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((is_decayed(name), getattr(parameter, "device_mesh", None)), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": ps, "weight_decay": config.weight_decay * decayed} for (decayed, _), ps in groups.items()],
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.eps,
        fused=True,
    )
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
    return optimizer
