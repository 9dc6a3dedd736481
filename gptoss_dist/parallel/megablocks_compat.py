"""Makes megablocks 0.10 work where its compiled module is missing, and on CPU tensors.

Two layers of megablocks need a GPU: the functions of its CUDA extension `megablocks_ops` (index bookkeeping) and the
Triton kernels in `megablocks.backend.kernels` (moving rows). Both get a torch twin here. Which one runs is decided per
call by the tensor's device, so one process can use CPU and CUDA tensors side by side. Nothing here syncs the host.

Shapes: T tokens, K experts per token, N = T * K rows (token-expert pairs), D hidden size, E experts (bins).
Positions: `indices_N[r]` is the pair `t * K + k` whose row is at sorted position r.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptoss_dist.distributed.collectives import LocalError

logger = logging.getLogger(__name__)


class MegaBlocks(NamedTuple):
    """The megablocks modules this project builds on."""

    arguments: types.ModuleType
    """The module `megablocks.layers.arguments`."""
    dmoe: types.ModuleType
    """The module `megablocks.layers.dmoe`."""
    ops: types.ModuleType
    """The module `megablocks.ops`: differentiable gather and scatter, sort, histogram, cumsum, replicate."""
    kernels: types.ModuleType
    """The module `megablocks.backend.kernels`, which gather and scatter call; `gather.__wrapped__` is Triton's."""


@functools.cache
def load_megablocks() -> MegaBlocks:
    """Import megablocks, with torch standing in for what cannot run here.

    Later calls return the same modules.

    Raises:
        ImportError: megablocks, stanford-stk or triton is not installed.
    """
    sys.modules["megablocks_ops"] = _ops_module(_compiled_ops())
    try:
        with warnings.catch_warnings():
            # Upstream warns on import that `grouped_gemm` is missing; our expert GEMM does not need it.
            warnings.simplefilter("ignore")
            names = ("layers.arguments", "layers.dmoe", "ops", "backend.kernels")
            modules = MegaBlocks(*(importlib.import_module(f"megablocks.{name}") for name in names))
    except ImportError as error:
        del sys.modules["megablocks_ops"]
        raise ImportError(f"megablocks cannot be imported ({error}); install it with: sh launch/install.sh") from error
    for torch_function in (gather, scatter, scatter_wgrad):
        name = torch_function.__name__
        triton_function = _limited_to_int32(getattr(modules.kernels, name))
        setattr(modules.kernels, name, _by_device(torch_function, triton_function))
    if not torch.cuda.is_available():
        # Upstream's backward passes name CUDA whatever the device, of which torch would warn in every run on a CPU.
        warnings.filterwarnings("ignore", message="User provided device_type of 'cuda', but CUDA is not available")
    return modules


def _compiled_ops() -> types.ModuleType | None:
    try:
        return importlib.import_module("megablocks_ops")
    except ImportError as error:
        level = logging.WARNING if torch.cuda.is_available() else logging.INFO
        logger.log(level, "megablocks' compiled module is not usable (%s): its torch equivalent is used", error)
        return None


def _ops_module(compiled: types.ModuleType | None) -> types.ModuleType:
    """Make a stand-in for `megablocks_ops`: compiled functions for CUDA tensors where they exist, torch otherwise."""
    module = types.ModuleType("megablocks_ops", "torch equivalents of megablocks' CUDA extension")
    module.__spec__ = importlib.machinery.ModuleSpec("megablocks_ops", None)
    for function in _index_functions():
        name = function.__name__
        setattr(module, name, function if compiled is None else _by_device(function, getattr(compiled, name)))
    return module


def _index_functions() -> tuple[Callable, ...]:
    return exclusive_cumsum, inclusive_cumsum, histogram, sort, indices, replicate_forward, replicate_backward


@contextmanager
def torch_twins() -> Iterator[None]:
    """Let the torch twins serve CUDA tensors too, within the limit of what they stand for.

    It is for tensors without data, on which no kernel of Triton or of the CUDA extension can be launched.
    """
    twins = [(load_megablocks().kernels, _limited_to_int32(function)) for function in (gather, scatter, scatter_wgrad)]
    twins += [(sys.modules["megablocks_ops"], function) for function in _index_functions()]
    before = [(module, twin.__name__, getattr(module, twin.__name__)) for module, twin in twins]
    try:
        for module, twin in twins:
            setattr(module, twin.__name__, twin)
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def _by_device(torch_function: Callable, cuda_function: Callable) -> Callable:
    @functools.wraps(cuda_function)
    def dispatch(x: Tensor, *args):
        return (cuda_function if x.is_cuda else torch_function)(x, *args)

    return dispatch


def _limited_to_int32(triton_function: Callable) -> Callable:
    """Refuse what the Triton kernels would address wrongly: they compute row offsets in int32."""

    @functools.wraps(triton_function)
    def checked(x: Tensor, *args):
        rows = max([x.shape[0], *(a.shape[0] for a in args if isinstance(a, Tensor))])
        if rows * x.shape[1] >= 2**31:
            raise LocalError(
                f"{rows} rows (tokens * experts per token) of hidden_size {x.shape[1]} exceed the 2^31 elements that "
                "megablocks' kernels can address; lower train.micro_batch_size or data.seq_len (and raise "
                "loss.aux_coef if it is expert parallelism that sends most tokens to one process)"
            )
        return triton_function(x, *args)

    return checked


# --- Row movement: the host functions of megablocks.backend.kernels, same signatures ---------------------------------
# `bin_ids` and `bins` locate padded bins in the Triton kernels; without padding a row's position is its own index.


def gather(x_TD: Tensor, indices_N: Tensor, bin_ids_N, weights_N: Tensor | None, bins_E, top_k: int) -> Tensor:
    """Return rows in expert order: y[r] = x[indices[r] // top_k] (* weights[indices[r]]), [N, D] in x's dtype."""
    y_ND = x_TD.index_select(0, indices_N // top_k if top_k > 1 else indices_N)
    if weights_N is not None:
        y_ND.mul_(weights_N.index_select(0, indices_N)[:, None])
    return y_ND


def scatter(x_ND: Tensor, indices_N: Tensor, bin_ids_N, weights_N: Tensor | None, bins_E, top_k: int) -> Tensor:
    """Return rows in token order: y[t] = sum over k of x[place of pair t * top_k + k] (* weight), [T, D] in x's dtype.

    An embedding bag does the permutation, the weighting and the sum in one pass, accumulating in float32.
    """
    position_TK = _inverse(indices_N).view(-1, top_k)
    if weights_N is None:
        return F.embedding_bag(position_TK, x_ND, mode="sum")
    dtype = torch.promote_types(x_ND.dtype, weights_N.dtype)
    weights_TK = weights_N.to(dtype).view(-1, top_k)
    return F.embedding_bag(position_TK, x_ND.to(dtype), mode="sum", per_sample_weights=weights_TK).to(x_ND.dtype)


def scatter_wgrad(x_ND: Tensor, grad_TD: Tensor, indices_N: Tensor, bin_ids_N, bins_E, top_k: int) -> Tensor:
    """Return the gradient of `scatter`'s weights: dw[indices[r]] = x[r] . grad[indices[r] // top_k], [N], x's dtype."""
    dot_N = torch.linalg.vecdot(x_ND, grad_TD.index_select(0, indices_N // top_k))
    return torch.empty_like(dot_N).index_copy_(0, indices_N.long(), dot_N)


def _inverse(permutation_N: Tensor) -> Tensor:
    arange_N = torch.arange(permutation_N.shape[0], dtype=permutation_N.dtype, device=permutation_N.device)
    return torch.empty_like(permutation_N).index_copy_(0, permutation_N.long(), arange_N)


# --- Index bookkeeping: the functions of megablocks_ops, same signatures, results written to `out` -------------------


def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Write the sum of what comes before each element, along the last dimension of a matrix."""
    out.copy_(torch.cumsum(x, dim, dtype=x.dtype) - x)


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Write the running sum along the last dimension of a matrix."""
    out.copy_(torch.cumsum(x, dim, dtype=x.dtype))


def histogram(x: Tensor, num_bins: int) -> Tensor:
    """Return how often each of 0 ... num_bins - 1 occurs, int32; per row if x is a matrix.

    Other values are not counted.
    """
    num_bins = int(num_bins)
    counts = torch.zeros(*x.shape[:-1], num_bins, dtype=torch.int32, device=x.device)
    counted = (x >= 0) & (x < num_bins)
    return counts.scatter_add_(-1, x.long().clamp(0, num_bins - 1), counted.int())


def sort(x: Tensor, end_bit: int, x_out: Tensor, iota_out: Tensor) -> None:
    """Write a vector, stably sorted by its low `end_bit` bits, and the positions that its elements had."""
    key = x if end_bit >= torch.iinfo(x.dtype).bits else x & ((1 << end_bit) - 1)
    order = torch.argsort(key, stable=True)
    x_out.copy_(x.index_select(0, order))
    iota_out.copy_(order)


def indices(padded_bins_E: Tensor, block_size: int, block_rows: int, block_columns: int, out: Tensor) -> None:
    """Write the column of each block of the block-sparse topology: e * block_columns and on in a row of expert e."""
    first_row = torch.arange(block_rows, device=out.device) * block_size
    expert = torch.searchsorted(padded_bins_E.long(), first_row, right=True)
    column = torch.arange(block_columns, device=out.device)
    out.copy_((expert[:, None] * block_columns + column).flatten())


def replicate_forward(x: Tensor, bins: Tensor, out: Tensor) -> None:
    """Write out[:, i] = x[:, the bin that position i falls into]; `bins` holds the ends of the bins."""
    out.copy_(x.index_select(1, _bin_of_position(bins, out.shape[1])))


def replicate_backward(grad: Tensor, bins: Tensor, out: Tensor) -> None:
    """Write the sum of each bin's gradients, accumulated in float32."""
    total = torch.zeros(out.shape, dtype=torch.float32, device=grad.device)
    out.copy_(total.index_add_(1, _bin_of_position(bins, grad.shape[1]), grad.float()))


def _bin_of_position(bins: Tensor, positions: int) -> Tensor:
    return torch.searchsorted(bins.long(), torch.arange(positions, device=bins.device), right=True)
