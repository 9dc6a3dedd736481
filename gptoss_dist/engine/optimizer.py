"""AdamW over float32 master weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor, nn

from gptoss_dist.config import OptimConfig


def is_decayed(name: str) -> bool:
    """Return whether weight decay acts on a parameter.

    It acts on matrices that multiply activations, and not on norms, biases, sinks or embeddings.
    """
    module, leaf = name.split(".")[-2:]
    return not ("norm" in module or "bias" in leaf or leaf == "sinks" or module == "embed_tokens")


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Take the gradient from the parameters whose names match.

    Raises:
        ValueError: A pattern matches none, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        for name in _matching(parameters, pattern, "optim.freeze"):
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError(f"optim.freeze={patterns} leaves nothing to train")


def _matching(names: Iterable[str], pattern: str, key: str) -> list[str]:
    found = fnmatch.filter(names, pattern)
    if not found:
        raise ValueError(
            f"{key}: no parameter's name matches {pattern!r}; names look like {', '.join(list(names)[:3])}"
        )
    return found


def parameter_groups(
    model: nn.Module, config: OptimConfig, home: Callable[[Tensor], Hashable]
) -> list[tuple[Hashable, dict]]:
    """Return the optimizer's groups, each with the `home` of its parameters.

    No group mixes parameters of two homes, nor decayed parameters with others.

    Args:
        model: The model.
        config: The factors of the learning rate, and the weight decay.
        home: What the parameters of a group must have in common, such as their device mesh.

    Raises:
        ValueError: A pattern of `optim.lr_scale` matches no parameter.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scales = dict.fromkeys(parameters, 1.0)
    for pattern, scale in config.lr_scale.items():
        scales |= dict.fromkeys(_matching(parameters, pattern, "optim.lr_scale"), scale)
    groups: dict[tuple[Hashable, bool, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((home(parameter), is_decayed(name), scales[name]), []).append(parameter)
    return [
        (h, {"params": ps, "weight_decay": config.weight_decay * decayed, "lr_scale": scale})
        for (h, decayed, scale), ps in groups.items()
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set each group's learning rate to `lr` times the group's own factor, before a step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def adamw(groups: list[dict], config: OptimConfig) -> torch.optim.AdamW:
    """Return the fused AdamW (arXiv:1711.05101)."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def allocate_state(optimizer: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """Make the state that the first step would make, so that a checkpoint can be loaded into it."""
    for p in parameters:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW for sharded parameters; experts may live on another device mesh than the rest."""
    groups = parameter_groups(model, config, lambda p: getattr(p, "device_mesh", None))
    optimizer = adamw([group for _, group in groups], config)
    allocate_state(optimizer, (p for p in model.parameters() if p.requires_grad))
    return optimizer
