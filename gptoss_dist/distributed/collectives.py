"""How ranks agree: values and errors that travel between them."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


_SIGNS_OF_PEER_LOSS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
    "Broken pipe",
    "Timed out waiting",
    "wait timeout",
    "connectFullMesh failed",
    "remote process exited",
    "ncclRemoteError",
)
"""What gloo, NCCL and the store write when another process has ended or does not answer."""


def is_peer_loss(error: BaseException | None) -> bool:
    """Return whether a collective failed because another process of the run has ended or does not answer."""
    while error is not None:
        if isinstance(error, dist.DistNetworkError):
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_PEER_LOSS):
            return True
        error = error.__cause__
    return False


class LocalError(ValueError):
    """A user's mistake that one process alone can meet, so that this one has to report it, whichever it is."""


def on_rank_zero(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T | None:
    """Call `function` on rank 0 while the others wait; collective.

    Args:
        function: What rank 0 does.
        group: A group of all ranks, if not the default one.

    Returns:
        Its result on rank 0, None elsewhere.

    Raises:
        ValueError, OSError: It raised one. Every rank raises it, so that none waits for a rank that gave up.
    """
    result, failure = None, None
    if dist.get_rank() == 0:
        try:
            result = function()
        except (ValueError, OSError) as error:
            failure = error
    outcome = [None if failure is None else (isinstance(failure, OSError), str(failure))]
    dist.broadcast_object_list(outcome, group=group, device=torch.device("cpu"))
    if failure is not None:
        raise failure
    if outcome[0] is not None:
        system, text = outcome[0]
        raise OSError(text) if system else ValueError(text)
    return result


def broadcast_object(function: Callable[[], T]) -> T:
    """Return what `function` returns on rank 0, on every rank; collective where there are ranks.

    Raises:
        ValueError, OSError: It raised one. Every rank raises it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return function()
    result: list[Any] = [on_rank_zero(function)]
    dist.broadcast_object_list(result, device=torch.device("cpu"))
    return result[0]


def all_gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the values of all ranks, on all ranks; collective where there are ranks.

    Args:
        value: This rank's value.
        group: A group of all ranks, if not the default one.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def long_timeout_group() -> dist.ProcessGroup:
    """Return a group of all ranks, on their CPUs, that waits a day for whoever has most to read or write; collective.

    A process that ends is still noticed at once, as its connections close; a machine that vanishes is noticed by the
    launcher only. The group connects every rank with every other, so one such group is enough.
    """
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))


def raise_on_every_rank(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call `function` on every rank, each for a part of the work; collective.

    Args:
        function: What this rank does.
        group: A group of all ranks, if not the default one.

    Returns:
        Its result on this rank.

    Raises:
        ValueError, OSError: It raised one on any rank. Every rank raises that of the lowest such rank.
    """
    result: Any = None
    failure = None
    try:
        result = function()
    except (ValueError, OSError) as error:
        failure = error
    mine = None if failure is None else (isinstance(failure, OSError), str(failure))
    for outcome in all_gather_objects(mine, group):
        if outcome is not None:
            system, text = outcome
            raise OSError(text) if system else ValueError(text)
    return result


def results_of_all_ranks(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Call `function` on every rank and return the results of all, on all of them; collective.

    Args:
        function: What this rank does.
        group: A group of all ranks, if not the default one.

    Raises:
        OSError: It raised anything on any rank. Every rank raises it; the message has those of all such ranks.
    """
    result: Any = None
    failure = None
    try:
        result = function()
    except Exception as error:  # nobody is left waiting for a rank that gave up
        failure = str(error) if isinstance(error, OSError) else repr(error)
    outcomes = all_gather_objects((result, failure), group)
    if failures := sorted({failure for _, failure in outcomes if failure}):
        raise OSError("; ".join(failures))
    return [result for result, _ in outcomes]
