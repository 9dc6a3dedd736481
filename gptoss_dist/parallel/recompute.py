"""Activation checkpointing: a block's forward pass runs again in the backward pass instead of keeping its activations.

Some results should not be computed twice: how many tokens go where (it costs a collective and a look of the host at the
device), and, if memory allows, the tokens that an all-to-all brought. `once` marks them.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


class _Recording:
    """What one run of a checkpointed block keeps for its recomputation, in the order in which it was computed."""

    def __init__(self, keep_large: bool) -> None:
        self.keep_large, self.replaying = keep_large, False
        self.results: deque[Any] = deque()


_current: _Recording | None = None


def once(compute: Callable[[], T], *, large: bool = False) -> T:
    """Return the value of `compute()`; while a checkpointed block is recomputed, the value that its forward pass had.

    Args:
        compute: What is computed. It is called without gradients in mind: what it returns is kept as it is.
        large: Keep it only where the block was told to (`checkpoint_activations(keep_large=True)`).
    """
    recording = _current
    if recording is None or (large and not recording.keep_large):
        return compute()
    if recording.replaying:
        return recording.results.popleft()
    result = compute()
    recording.results.append(result)
    return result


def checkpoint_activations(block: nn.Module, *, keep_large: bool = False) -> None:
    """Make `block` recompute its activations in the backward pass, in place (non-reentrant `torch.utils.checkpoint`).

    Args:
        block: The block.
        keep_large: Keep also what is marked `large` in `once`.
    """
    contexts = functools.partial(_contexts, keep_large)
    # partial binds this block's own forward; a closure over a caller's loop variable would recompute the last one.
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def _contexts(keep_large: bool):
    recording = _Recording(keep_large)
    return _current_is(recording, replaying=False), _current_is(recording, replaying=True)


@contextlib.contextmanager
def _current_is(recording: _Recording, replaying: bool) -> Iterator[None]:
    global _current
    before, _current = _current, recording
    recording.replaying = replaying
    try:
        yield
    finally:
        _current = before
