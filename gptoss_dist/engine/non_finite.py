"""Where the first value that is not finite arose: in the output of which module, or the gradient of which parameter.

A skipped step says that a loss or a gradient was not finite, and not where that came from: it spreads through all that
is computed afterwards. So, when asked to, every output and every gradient is looked at, on the device and without
waiting for it. Only after a step that was skipped are the answers fetched.

    forward, in this order    embed_tokens   layers.0.self_attn   layers.0.mlp   ...   the loss
    backward, in this order   lm_head.weight   layers.1.mlp.experts...   ...   embed_tokens.weight

The first that is not finite in this order is the one to look at. A sharded gradient is summed over ranks before it can
be seen, so that its rank is the one that holds this part of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Finding(NamedTuple):
    """The first value of a step that is not finite on one rank; findings compare by how early they are."""

    is_gradient: bool
    position: int
    """Its place in the order of the forward pass, or of the backward pass."""
    name: str

    def __str__(self) -> str:
        if self.is_gradient:
            return f"in the gradient of {self.name} (all outputs were finite)"
        return f"in the output of {self.name or 'the model'}"


class NonFiniteFinder:
    """A look at every output and gradient of a model, step by step; the last two steps are kept.

    Args:
        model: The model, with the hooks of whoever shards it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._looks: dict[int, tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]] = {}
        self.begin(0)
        for name, module in model.named_modules():
            module.register_forward_hook(functools.partial(self._look_at_output, name))

    def begin(self, step: int) -> None:
        """Note that what comes now belongs to step `step`."""
        self._outputs: list[tuple[str, Tensor]] = []
        self._gradients: list[tuple[str, Tensor]] = []
        self._looks[step] = (self._outputs, self._gradients)
        for old in [known for known in self._looks if known not in (step, step - 1)]:
            del self._looks[old]

    def look_at_gradients(self, gradients: Iterable[tuple[str, Tensor]]) -> None:
        """Look at gradients, by name and in the order of the backward pass."""
        for name, gradient in gradients:
            self._gradients.append((name, _is_wrong(gradient)))

    def watch_gradients(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Look at the gradients of some parameters whenever a backward pass makes them, before they are summed."""
        for name, parameter in parameters:
            if parameter.requires_grad:
                parameter.register_hook(functools.partial(self._look_at_gradient, name))

    def first(self, step: int) -> Finding | None:
        """Return the first value of a step that is not finite on this rank; it waits for the device.

        Args:
            step: The last step or the one before.
        """
        for is_gradient, looks in enumerate(self._looks.get(step, ())):
            wrong = torch.stack([look for _, look in looks]).tolist() if looks else []
            if True in wrong:
                return Finding(bool(is_gradient), wrong.index(True), looks[wrong.index(True)][0])
        return None

    def _look_at_output(self, name: str, module: nn.Module, inputs: object, output: object) -> None:
        if module.training:
            for tensor in _tensors(output):
                self._outputs.append((name, _is_wrong(tensor)))

    def _look_at_gradient(self, name: str, gradient: Tensor) -> None:
        self._gradients.append((name, _is_wrong(gradient)))


def _is_wrong(tensor: Tensor) -> Tensor:
    return ~torch.isfinite(tensor.detach()).all()


def _tensors(values: object) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
