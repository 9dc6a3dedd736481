"""Bytes that a process sends in collectives, whoever calls them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class SentBytes:
    """A count of the bytes that collectives send, by the usual model of ring algorithms over n processes.

    An all-gather or a reduce-scatter sends (n-1)/n of the whole, an all-reduce twice that, a broadcast the tensor, and
    an all-to-all what goes to others.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, float] = {}
        """Bytes by the name of torch's operator, such as `_allgather_base_`."""

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.by_name.values())

    @contextmanager
    def counting(self, enabled: bool = True) -> Iterator[None]:
        """Count the collectives of this thread; on CPU the backward pass is in it too."""
        with _Mode(self) if enabled else nullcontext():
            yield


class _Mode(TorchDispatchMode):
    def __init__(self, sent: SentBytes) -> None:
        super().__init__()
        self.sent = sent

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._schema.name.split("::")[1]
            self.sent.by_name[name] = self.sent.by_name.get(name, 0) + sent_bytes(name, args)
        return function(*args, **(kwargs or {}))


def _bytes(tensors) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors)) if isinstance(tensors, (list, tuple)) else 0


def sent_bytes(name: str, args: tuple) -> float:
    """Return what this process sends in one collective, by the model of `SentBytes`.

    Args:
        name: Of the operator in the namespace c10d.
        args: Of the call.
    """
    group = _group(args)
    n = group.size()
    share = (n - 1) / n
    if name.startswith("allreduce"):
        return 2 * share * _bytes(args[0])
    if name.startswith(("_allgather_base", "allgather")):
        return share * _bytes(args[0])
    if name.startswith(("_reduce_scatter_base", "reduce_scatter")):
        return share * _bytes(args[1])
    if name.startswith("alltoall_base"):
        return sum(sent_by_distance(name, args)[1:])
    if name.startswith("broadcast"):
        return _bytes(args[0]) if n > 1 else 0
    return 0.0  # barriers, and objects that are a few bytes


def sent_by_distance(name: str, args: tuple) -> tuple[float, ...]:
    """Return what this process sends in an all-to-all to the process so many places further in the group, in bytes.

    The first is what stays here. Nothing is returned for other collectives.

    Args:
        name: Of the operator in the namespace c10d.
        args: Of the call.
    """
    if not name.startswith("alltoall_base"):
        return ()
    group = _group(args)
    n, rank = group.size(), group.rank()
    rows = args[4] or [args[1].shape[0] // n] * n  # how many go to each process
    row = args[1][:1].numel() * args[1].element_size() if sum(rows) else 0
    return tuple(float(rows[(rank + distance) % n] * row) for distance in range(n))


def _group(args: tuple) -> dist.ProcessGroup:
    return dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
