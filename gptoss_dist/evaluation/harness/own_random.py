"""Random numbers of tasks while a model trains: training's are as if tasks had drawn none.

Tasks draw from the generators that Python, numpy and torch share among all threads, and training draws from them too.

    the harness ends in time        `same_random_numbers` puts the states back, whatever was drawn or seeded
    it goes on after its time       `own_random_numbers` has given its thread generators of its own

The second is for the time after the first: it covers the usual calls, not all that there are.

    random.random(), numpy.random.rand(), torch.manual_seed(...)   a function of the module that asks which thread calls
    torch.rand(...), tensor.uniform_() on the CPU                  torch's function modes, which belong to a thread

So a harness that goes on after its time changes the shared generators where it calls anything else: a function that
somebody took out of its module before (`from random import shuffle`), one that draws within torch (`torch.rand_like`,
dropout, the initial weights of a layer), one that sets a state, a method of a generator, or one that draws on a GPU.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_OF_TORCH = ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial")
_OF_TENSORS = ("bernoulli", "multinomial")
_IN_PLACE = ("bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_")
_DRAWING = {getattr(torch, name) for name in _OF_TORCH} | {getattr(Tensor, name) for name in (*_OF_TENSORS, *_IN_PLACE)}


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Leave the generators that all threads share as they were: those of Python, of numpy, and of torch for a device.

    Args:
        device: That of the model, whose generator is put back beside that of the CPU.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Give the calling thread generators of its own for the calls above; other threads keep those that there are.

    Args:
        seed: What they begin with.
    """
    own, of_numpy, of_torch = random.Random(seed), np.random.RandomState(seed), torch.Generator().manual_seed(seed)
    with ExitStack() as stack:
        stack.enter_context(_diverted(random, _bound_to(random, random._inst), own))
        shared = np.random.mtrand._rand
        stack.enter_context(_diverted(np.random, {"seed", *_bound_to(np.random, shared)}, of_numpy))
        stack.enter_context(_diverted(torch, {"manual_seed", "seed", "initial_seed"}, of_torch))
        stack.enter_context(_Drawing(of_torch))
        yield


def _bound_to(module: ModuleType, shared: object) -> set[str]:
    """Return the functions of a module that are methods of the generator that all threads share."""
    return {name for name, function in vars(module).items() if getattr(function, "__self__", None) is shared}


@contextmanager
def _diverted(module: ModuleType, names: set[str], own: Any) -> Iterator[None]:
    """Let functions of a module be methods of the same name of `own`, for the calling thread."""
    before = {name: getattr(module, name) for name in names if hasattr(own, name)}
    for name, shared in before.items():
        setattr(module, name, _choosing(threading.get_ident(), getattr(own, name), shared))
    try:
        yield
    finally:
        for name, shared in before.items():
            setattr(module, name, shared)


def _choosing(thread: int, own: Callable[..., Any], shared: Callable[..., Any]) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        return (own if threading.get_ident() == thread else shared)(*args, **kwargs)

    return function


class _Drawing(TorchFunctionMode):
    """Lets what draws on the CPU without a generator draw from this one."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _DRAWING and kwargs.get("generator") is None:
            device = kwargs.get("device") or next((a.device for a in args if isinstance(a, Tensor)), "cpu")
            if torch.device(device).type == "cpu":
                kwargs = {**kwargs, "generator": self.generator}
        return function(*args, **kwargs)
