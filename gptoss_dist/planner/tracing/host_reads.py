"""Calls that make the host wait for the device, each with the line of our code that asked.

The host launches kernels and runs ahead of the device. Whatever needs a tensor's value on the host, or a blocking copy,
makes it wait until the device has caught up. Two layers see that: what Python calls on a tensor, and the operators,
which the backward pass and C++ call too. A call that both see counts once.

    if (x < 0).any():            __bool__, and within it the operator _local_scalar_dense: one read, of this line

What an operator's kernel does inside is not seen here.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
"""Methods of Tensor that read it."""
OPERATORS = {
    *("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}
"""Operators of aten that read a tensor: its value, or how large their result will be."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
TO_HOST, FROM_HOST = "copy to the host", "copy from the host"
GROUPED_MM = "within _grouped_mm"
"""A wait inside of a kernel's launch, which whoever knows the GPU has to note."""

_ROOT = Path(__file__).parents[3]
_PACKAGES = ("gptoss_dist", "data_pipeline")
_WATCHERS = {__name__, "gptoss_dist.planner.tracing.cuda_trace"}
"""Modules that stand between the code and its operators only because it is being watched."""


class HostRead(NamedTuple):
    """One wait of the host, or several that are alike."""

    call: str
    """The method or operator, or which way a blocking copy went."""
    file: str
    """Source file, from the root of the project."""
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function}): {self.call}"


DOCUMENTS_PER_SEQUENCE = 4
"""What a trace with documents assumes; sizes of a few small tensors depend on it, and nothing else."""


class Sizes(NamedTuple):
    """What answers to host reads are made of."""

    tokens: int
    seq_len: int
    experts_per_token: int


@dataclass(frozen=True)
class DocumentedRead:
    """A wait of the host that is known, and why it is there."""

    calls: tuple[str, ...]
    file: str
    """Empty for any."""
    function: str
    """Empty for any."""
    often: str
    why: str
    answer: Callable[[Sizes, Tensor], list] | None = None
    """What a trace goes on with: the list that the code asked for."""


def _even_routing(sizes: Sizes, counts_E: Tensor) -> list[int]:
    experts = counts_E.shape[0]
    rows = sizes.tokens * (1 if experts == 1 else sizes.experts_per_token)  # one expert is a shared one
    return [rows // experts + (e < rows % experts) for e in range(experts)]


def _documents(sizes: Sizes, summary_3: Tensor) -> list[int]:
    return [0, sizes.tokens // sizes.seq_len * DOCUMENTS_PER_SEQUENCE, sizes.seq_len]


TOLIST = ("tolist", TO_HOST)  # which is all that is seen of it in recomputation
DOCUMENTED = (
    DocumentedRead(
        (FROM_HOST,),
        "gptoss_dist/model/rope.py",
        "__call__",
        "once per run and type of layer, in the first forward pass",
        "rotary frequencies are computed on the host",
    ),
    DocumentedRead(
        TOLIST,
        "gptoss_dist/ops/attention/documents.py",
        "locate_documents_of_runs",
        "once per micro-batch with documents",
        "sizes, and the grid of the flash kernels, depend on where they lie",
        _documents,
    ),
    DocumentedRead(
        TOLIST,
        "gptoss_dist/parallel/exchange.py",
        "_counts",
        "once per layer and micro-batch with expert parallelism, not again if recomputed",
        "all-to-alls take the numbers of rows from the host",
    ),
    DocumentedRead(
        TOLIST,
        "gptoss_dist/ops/experts/loop.py",
        "loop_experts",
        "once per layer and forward pass where grouped_mm cannot serve",
        "rows are split by expert on the host",
        _even_routing,
    ),
    # Its kernel is compiled for capabilities 9 and 10, and bf16 (ATen/native/cuda/GroupedBlas.cpp, `_grouped_mm_cuda`).
    # All else takes `_grouped_mm_fallback` in ATen/native/GroupedMMUtils.h, which begins with `offs.cpu()`.
    DocumentedRead(
        (GROUPED_MM,),
        "",
        "",
        "each product in fp32, or in bf16 where the capability is not 9 or 10",
        "torch multiplies expert by expert there, and reads where rows end",
    ),
)
"""All host reads of a step that are meant to be there."""


def documented(read: HostRead) -> DocumentedRead | None:
    """Return the entry of `DOCUMENTED` for a read, if there is one."""
    for entry in DOCUMENTED:
        if read.call in entry.calls and entry.file in ("", read.file) and entry.function in ("", read.function):
            return entry
    return None


class HostReadWatch(TorchFunctionMode):
    """A context in which every read of a device's tensor is noted.

    Tensors without data (meta tensors and fake ones) have no value to give: what asks for one gets `answer`, or else
    zeros, and the code goes on.

    Args:
        device_type: The device whose tensors count. A test without CUDA says `cpu`: all tensors count, but of copies
            only those to a literal "cpu", since another tensor's device would be CUDA there.
        answer: (read, tensor) -> what is read of a tensor without data, as a list, or None for zeros.
    """

    def __init__(self, device_type: str, answer: Callable[[HostRead, Tensor], list | None] | None = None) -> None:
        super().__init__()
        self.device_type, self.reads = device_type, list[HostRead]()
        self._answer, self._operators = answer, _Operators(self)
        self._is_noted = False

    @property
    def calls(self) -> list[str]:
        """The calls alone, in their order."""
        return [read.call for read in self.reads]

    def counts(self, value: object) -> bool:
        """Return whether it is a tensor of the device."""
        return isinstance(value, Tensor) and value.device.type == self.device_type

    def note(self, call: str) -> HostRead | None:
        """Note a read, unless it is part of a call that has been noted."""
        if self._is_noted:
            return None
        read = HostRead(call, *_asking_line())
        self.reads.append(read)
        return read

    def answer(self, read: HostRead | None, tensor: Tensor) -> list | None:
        """Return what is read of a tensor without data; None if nobody knows."""
        return self._answer(read, tensor) if self._answer is not None and read is not None else None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        call = self._call(getattr(function, "__name__", ""), args, kwargs)
        read = self.note(call) if call is not None else None
        if read is None:
            return function(*args, **kwargs)
        if call == "tolist" and has_no_data(args[0]):
            values = self.answer(read, args[0])
            return _zeros(args[0].shape) if values is None else values
        self._is_noted = True
        try:
            return function(*args, **kwargs)
        finally:
            self._is_noted = False

    def _call(self, name: str, args: tuple, kwargs: dict) -> str | None:
        tensor = args[0] if args else kwargs.get("input")
        if name in METHODS:
            return name if self.counts(tensor) else None
        if name == "to" and self.counts(tensor):
            return name if any(isinstance(a, str) and a == "cpu" for a in (*args[1:], *kwargs.values())) else None
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            # The length of repeats has to be read back unless the caller states it.
            return name if self.counts(kwargs.get("repeats", args[1] if len(args) > 1 else tensor)) else None
        if name in ("tensor", "as_tensor") and self.device_type != "cpu" and kwargs.get("device") is not None:
            return FROM_HOST if torch.device(kwargs["device"]).type == self.device_type else None
        return None

    def __enter__(self):
        self._operators.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._operators.__exit__(*error)


class _Operators(TorchDispatchMode):
    """Sees also what the backward pass and C++ call, and answers for tensors without data."""

    def __init__(self, watch: HostReadWatch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        call = self._call(name, args, kwargs)
        read = self.watch.note(call) if call is not None else None
        if not (args and has_no_data(args[0])):
            return function(*args, **kwargs)
        tensor = args[0]
        if name in ("_local_scalar_dense", "item"):
            return 0.0 if tensor.is_floating_point() else False if tensor.dtype == torch.bool else 0
        if name == "nonzero":  # as if there were nothing but ones
            return tensor.new_empty((tensor.numel(), tensor.dim()), dtype=torch.int64)
        if call == TO_HOST and tensor.is_meta:
            values = self.watch.answer(read, tensor)
            zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
            return zeros if values is None else torch.tensor(values, dtype=tensor.dtype)
        return function(*args, **kwargs)

    def _call(self, name: str, args: tuple, kwargs: dict) -> str | None:
        counts = self.watch.counts
        if name in OPERATORS:
            return name if counts(args[0]) else None
        if name == "repeat_interleave":
            return name if counts(args[0]) and kwargs.get("output_size") is None else None
        if name in INDEXING and counts(args[0]):
            return _reading_index(args[1], self.watch.device_type)
        if name == "_to_copy":
            target = kwargs.get("device")
            if target is None or kwargs.get("non_blocking", False):
                return None
            return self._copy(args[0].device.type, torch.device(target).type)
        if name == "copy_" and not (kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])):
            return self._copy(args[1].device.type, args[0].device.type)
        return None

    def _copy(self, source: str, target: str) -> str | None:
        if source == target or self.watch.device_type not in (source, target):
            return None
        return FROM_HOST if source == "cpu" else TO_HOST


def has_no_data(value: object) -> bool:
    """Return whether it is a tensor of a shape and type only."""
    return isinstance(value, Tensor) and (value.is_meta or isinstance(value, FakeTensor))


def _zeros(shape: tuple[int, ...]) -> Any:
    return [_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0


def _reading_index(indices: Any, device_type: str) -> str | None:
    for index in indices:
        if isinstance(index, Tensor):
            if index.dtype in (torch.bool, torch.uint8):
                return "index by a mask"
            if index.device.type != device_type:
                return FROM_HOST
    return None


def _asking_line() -> tuple[str, int, str]:
    """Return file, line and function of the innermost frame of our own."""
    frame = sys._getframe(1)
    while frame is not None:
        shown = _shown(frame.f_code.co_filename)
        if shown is not None and frame.f_globals.get("__name__") not in _WATCHERS:
            return shown, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    return "?", 0, "?"


@functools.lru_cache(maxsize=1024)
def _shown(filename: str) -> str | None:
    """Return a source file's name from the root of the project; None if it is of a library or of Python."""
    path = Path(filename)
    if path.is_relative_to(_ROOT) and path.relative_to(_ROOT).parts[0] in _PACKAGES:
        return str(path.relative_to(_ROOT))
    stdlib = sysconfig.get_path("stdlib")
    if filename.startswith("<") or "site-packages" in path.parts or path.is_relative_to(stdlib):
        return None
    return str(path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path)
