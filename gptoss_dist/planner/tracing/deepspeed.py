"""DeepSpeed on tensors that hold nothing: what it reads on the host is answered, and its globals are put back.

DeepSpeed looks at values to decide three things: whether a gradient is finite, whether gradients are clipped, and
whether all ranks list the same parameters. What asks runs as it is, so that its operators and collectives are seen, and
then hears what a good step would give.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

LARGE_NORM = 1e6
"""A gradient norm above any sensible `optim.clip_norm`, so that clipping is part of the step."""


class HostReads:
    """What the host gets when it reads a value of a tensor that holds none."""

    def __init__(self) -> None:
        self._given: list[Any] = []

    def __call__(self, tensor: Tensor) -> bool | float | int:
        """Return what `given` says, or else: labels are valid, and no activation is near its clamp."""
        if self._given:
            return self._given.pop(0)
        if tensor.dtype == torch.bool:
            return True
        return 0.5 if tensor.dtype.is_floating_point else 1

    @contextlib.contextmanager
    def given(self, values: list[Any]) -> Iterator[None]:
        """Answer the next reads with `values`, one after another."""
        self._given = list(values)
        try:
            yield
        finally:
            self._given = []


@contextlib.contextmanager
def answered(reads: HostReads) -> Iterator[None]:
    """Let DeepSpeed find that gradients are finite and large, and that all ranks agree."""
    from deepspeed.runtime import utils
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.runtime.zero.utils import assert_ints_same_as_other_ranks

    @functools.wraps(assert_ints_same_as_other_ranks)
    def all_agree(ints: list[int]) -> None:
        with reads.given([len(ints), *ints]):
            assert_ints_same_as_other_ranks(ints)

    with contextlib.ExitStack() as stack:
        for optimizer in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
            stack.enter_context(patch.object(optimizer, "has_overflow", _returning(False, optimizer.has_overflow)))
        for name, function, replacement in (
            ("is_invalid_grad_norm", finite := utils.is_invalid_grad_norm, _returning(False, finite)),
            ("get_norm_with_moe_layers", norm := utils.get_norm_with_moe_layers, _returning(LARGE_NORM, norm)),
            ("assert_ints_same_as_other_ranks", assert_ints_same_as_other_ranks, all_agree),
            ("see_memory_usage", utils.see_memory_usage, lambda *_, **__: None),  # prints, after collecting garbage
        ):
            for module in _importers(name, function):
                stack.enter_context(patch.object(module, name, replacement))
        yield


@contextlib.contextmanager
def globals_put_back() -> Iterator[None]:
    """Give DeepSpeed a process without a past, and put back what it was afterwards: its process groups and counts."""
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    # ZeRO 3 numbers all modules that it ever saw in a default argument, and keeps each model in a list.
    (numbered,) = parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    lists = [(found, list(found)) for found in (numbered, parameter_offload.FWD_MODULE_STACK)]
    kept = [(holder, _state(holder)) for holder in (real_accelerator, comm, groups, Init)]
    real_accelerator.ds_accelerator, comm.cdb = CPU_Accelerator(), None
    for name, value in _state(groups).items():
        if name.isupper() and name.startswith("_") and not isinstance(value, str):
            setattr(groups, name, {} if isinstance(value, dict) else None)
    groups.mesh_device = None
    try:
        yield
    finally:
        for found, before in lists:
            found[:] = before
        for holder, state in kept:
            for name, value in state.items():
                setattr(holder, name, value)


def _state(holder: Any) -> dict[str, Any]:
    """Return the values of a module's or a class's plain attributes; its dictionaries are copied."""
    values = {name: value for name, value in vars(holder).items() if not name.startswith("__") and not callable(value)}
    return {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}


def _returning(value: Any, function: Callable) -> Callable:
    """Return a function that runs `function` and returns `value`."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        function(*args, **kwargs)
        return value

    return run


def _importers(name: str, function: Callable) -> list[Any]:
    """Return DeepSpeed's modules that know a function by its name."""
    loaded = [module for key, module in list(sys.modules.items()) if key.split(".")[0] == "deepspeed" and module]
    return [module for module in loaded if vars(module).get(name) is function]
