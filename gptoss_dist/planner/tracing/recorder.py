"""What a step does, operator by operator: its work, its memory and its collectives.

A `Recorder` is a dispatch mode. It sees every operator that reaches the dispatcher of torch, on real tensors and on
fake ones alike, and keeps for each

    operators     name, phase, matrix FLOPs, bytes read and written, the storages that it reads and writes
    collectives   the same, and how many processes take part and how many bytes this one sends
    storages      when each block of memory came, grew, shrank and went, and what it was for

so that whoever prices a step (`roofline.py`), adds up its memory (`Trace.memory`) or its traffic reads one list. What
happens inside of one operator, such as the workspace of a kernel, is not seen.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptoss_dist.parallel.traffic import sent_by_distance, sent_bytes
from gptoss_dist.planner.tracing.work import matrix_flops

aten = torch.ops.aten


class Operator(NamedTuple):
    """One call of an operator."""

    name: str
    """Such as `aten.mm.default`."""
    phase: str
    """`forward`, `backward` (recomputation included) or `update`."""
    flops: int
    """Of matrix products, two per multiply-add; 0 for everything else."""
    read: int
    """Bytes of the tensors that it reads."""
    written: int
    """Bytes of the tensors that it writes."""
    dtype: torch.dtype | None
    """Of its first floating-point operand."""
    shapes: tuple[tuple[int, ...], ...]
    """Of the tensors that it reads."""
    inputs: tuple[int, ...]
    """Numbers of the storages that it reads."""
    outputs: tuple[int, ...]
    """Numbers of the storages that it writes."""
    group: tuple[int, ...] = ()
    """Of a collective: the ranks that take part."""
    sent: float = 0.0
    """Of a collective: bytes that this process sends, by the ring model of `parallel/traffic.py`."""
    by_distance: tuple[float, ...] = ()
    """Of an all-to-all: bytes that it sends to the process so many places further in the group, 0 being itself."""

    def leaving(self, node_size: int) -> list[float]:
        """Return the bytes that each member of the group sends to other machines in an all-to-all.

        The others are taken to send as far as this process does: in a ring each to the next one.

        Args:
            node_size: Consecutive ranks that share a machine.
        """
        nodes = [rank // node_size for rank in self.group]
        n, by_distance = len(nodes), self.by_distance or (0.0, *[self.sent / (len(nodes) - 1)] * (len(nodes) - 1))
        return [
            sum(bytes for distance, bytes in enumerate(by_distance) if nodes[(place + distance) % n] != node)
            for place, node in enumerate(nodes)
        ]


@dataclass
class Storage:
    """One block of memory."""

    number: int
    role: str | None
    """What it is for, if that is known from the start: `weights`, `optimizer`, `inputs`, ..."""
    vocabulary: bool = False
    """Whether a dimension of the tensor that came with it is the vocabulary."""
    phase: str = "before"
    """When it came."""
    uses: set[str] = field(default_factory=set)
    """Kinds of collectives that read or wrote it, and `resized` for what is freed and filled again."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(index of the operator, bytes from then on); the last has 0 bytes once the block is gone."""

    def bytes_at(self, index: int) -> int:
        """Return the bytes of the block after operator `index`."""
        size = 0
        for at, nbytes in self.sizes:
            if at > index:
                break
            size = nbytes
        return size

    @property
    def last(self) -> float:
        """The index of the operator after which the block was gone; infinity if it stayed."""
        at, nbytes = self.sizes[-1]
        return at if nbytes == 0 else float("inf")


class Recorder(TorchDispatchMode):
    """Records every operator while it is active, and storages that came while it was.

    Args:
        vocab_size: Tensors with this dimension belong to the head.
        fake_mode: The mode whose tensors are recorded; None records real ones.
        read_host: What a read of the host gives, for fake tensors, which hold nothing: called with the tensor. None
            lets the operator itself run.
    """

    def __init__(
        self,
        vocab_size: int = 0,
        fake_mode: FakeTensorMode | None = None,
        read_host: Callable[[Tensor], Any] | None = None,
    ) -> None:
        super().__init__()
        self._fake_mode = fake_mode
        self.operators: list[Operator] = []
        self.storages: list[Storage] = []
        self.phase = "forward"
        """Set it to `forward` at each forward pass and to `update` at the update; `backward` comes by itself."""
        self.paused = False
        """While it is set, nothing is recorded."""
        self._vocab_size, self._read_host = vocab_size, read_host
        self._numbers: dict[int, int] = {}

    # Storages --------------------------------------------------------------------------------------------------------

    def adopt(self, tensors: Any, role: str) -> int:
        """Note what tensors that exist already are for.

        Returns:
            The bytes of their storages, each counted once.
        """
        found = {self._storage(t, role).number for t in tensors}
        for number in found:
            self.storages[number].role = role
        return sum(self.storages[number].bytes_at(len(self.operators)) for number in found)

    def _storage(self, tensor: Tensor, role: str | None = None) -> Storage:
        block = tensor.untyped_storage()
        key = block._cdata
        if key not in self._numbers:
            storage = Storage(len(self.storages), role, self._vocab_size in tensor.shape, self._phase())
            storage.sizes.append((len(self.operators), block.nbytes()))
            self.storages.append(storage)
            self._numbers[key] = storage.number
            weakref.finalize(block, self._gone, key, storage)
        return self.storages[self._numbers[key]]

    def _gone(self, key: int, storage: Storage) -> None:
        self._numbers.pop(key, None)
        storage.sizes.append((len(self.operators), 0))

    @contextmanager
    def _following_resizes(self) -> Iterator[None]:
        """FSDP frees gathered weights by resizing their storage, of which the dispatcher hears nothing."""
        resize = torch.UntypedStorage.resize_

        @functools.wraps(resize)
        def resized(block: torch.UntypedStorage, size: int):
            result = resize(block, size)
            if block._cdata in self._numbers:
                storage = self.storages[self._numbers[block._cdata]]
                storage.uses.add("resized")
                storage.sizes.append((len(self.operators), size))
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    def _counts(self, tensor: Tensor) -> bool:
        """Return whether a tensor is one of the step, and not the model's on the meta device."""
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode is self._fake_mode
        return self._fake_mode is None and not tensor.is_meta

    # Operators -------------------------------------------------------------------------------------------------------

    def __enter__(self):
        self._resizes = self._following_resizes()
        self._resizes.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._resizes.__exit__(None, None, None)

    def _phase(self) -> str:
        # Autograd's node is there while a backward pass runs, in what it recomputes too, but not in what FSDP does at
        # its very end: the pass lasts until whoever records says what comes next.
        if self.phase == "forward" and torch._C._current_autograd_node() is not None:
            self.phase = "backward"
        return self.phase

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):  # comes again, on this process's part
            return NotImplemented
        if self.paused or function.namespace == "prim":  # a question about a tensor, such as its device
            return function(*args, **kwargs)
        if function is aten._local_scalar_dense.default and self._read_host is not None:
            return self._read_host(args[0])
        result = function(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and self._counts(leaf)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and self._counts(leaf)]
        if not inputs and not outputs:
            return result
        read = [self._storage(t) for t in inputs]
        written = [self._storage(t) for t in outputs]
        collective = function.namespace == "c10d"
        if collective:
            kind = collective_kind(function._schema.name.split("::")[1])
            for storage in read + written:
                storage.uses.add(kind)
        if collective or not _only_a_view(function, read, written):
            self.operators.append(self._operator(function, args, kwargs, inputs, outputs, read, written))
        return result

    def _operator(self, function, args, kwargs, inputs, outputs, read, written) -> Operator:
        group: tuple[int, ...] = ()
        sent, by_distance = 0.0, tuple[float, ...]()
        if function.namespace == "c10d":
            name = function._schema.name.split("::")[1]
            group, sent, by_distance = _group(args), sent_bytes(name, args), sent_by_distance(name, args)
        dtype = next((t.dtype for t in inputs + outputs if t.dtype.is_floating_point), None)
        # In place or into `out`: what is written is among the arguments, and comes back as a result or not at all.
        changed = _changed(function, args, kwargs)
        fresh = outputs + [t for t in changed if not any(t is o for o in outputs)]
        return Operator(
            str(function),
            self._phase(),
            matrix_flops(function, args, kwargs, result=outputs),
            sum(_bytes(t) for t in inputs),
            sum(_bytes(t) for t in fresh),
            dtype,
            tuple(tuple(t.shape) for t in inputs),
            tuple(s.number for s in read),
            tuple({s.number for s in written} | {self._storage(t).number for t in changed}),
            group,
            sent,
            by_distance,
        )


def collective_kind(name: str) -> str:
    """Return what a collective of c10d is in the field's words, such as `all-gather`."""
    for kind in ("allgather", "reduce_scatter", "allreduce", "alltoall", "broadcast"):
        if kind in name:
            return {"allgather": "all-gather", "reduce_scatter": "reduce-scatter", "allreduce": "all-reduce"}.get(
                kind, "all-to-all" if kind == "alltoall" else kind
            )
    return name.strip("_")


def _group(args) -> tuple[int, ...]:
    group = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
    return tuple(dist.get_process_group_ranks(group))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _only_a_view(function, read: list[Storage], written: list[Storage]) -> bool:
    """Return whether an operator moved nothing: all that it returned shares memory with its arguments."""
    if function._schema.is_mutable or not written:
        return False
    known = {s.number for s in read}
    return all(s.number in known for s in written)


def _changed(function, args, kwargs) -> list[Tensor]:
    changed = []
    for index, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            changed += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return changed
