"""Elementwise work compiled into one pass over memory, for what runs outside of a compiled block."""

import functools
from collections.abc import Callable

import torch


@functools.cache
def fused(function: Callable) -> Callable:
    """`function` through torch.compile; on CPU this needs a C++ compiler.

    One kernel serves all sizes: the rows of an expert or the keys of a tile keep changing.
    """
    return torch.compile(function, dynamic=True)
