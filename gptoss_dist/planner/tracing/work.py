"""How many FLOPs one operator has: those of matrix products and attention, by the shapes of its operands.

torch's own registry (`torch.utils.flop_counter`) knows the stock operators. Ours are added: sink attention, which skips
what its window hides, and the grouped products of experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from gptoss_dist.planner.flops import visible_pairs


def matrix_flops(function, args, kwargs: dict[str, Any], result: list[Tensor]) -> int:
    """Return the FLOPs of matrix products in one call, two per multiply-add; 0 for an operator that has none.

    Args:
        function: The overload that was called.
        args: Its positional arguments.
        kwargs: Its named arguments.
        result: The tensors that it returned.
    """
    packet = function.overloadpacket
    name = packet._qualified_op_name
    if name == "gptoss_dist::sink_attention":
        return 4 * _attention_products(args[0], window=args[5])
    if name == "gptoss_dist::sink_attention_backward":
        return 10 * _attention_products(args[1], window=args[8])
    if name == "gptoss_dist::block_attention":
        return 4 * _block_products(args[0], keys=args[1])
    if name == "gptoss_dist::block_attention_backward":
        return 10 * _block_products(args[1], keys=args[2])
    if name == "aten::_grouped_mm":
        return _grouped(args[0], args[1])
    # torch lists products such as `addmm` and forgets that there is an `addmm_`.
    formula = flop_registry.get(packet) or flop_registry.get(getattr(torch.ops.aten, name[6:].rstrip("_"), None))
    if formula is None:
        return 0
    out = result[0] if len(result) == 1 else tuple(result)
    keywords = {key: value for key, value in kwargs.items() if key not in ("out", "dtype")}
    return int(formula(*args, **keywords, out_val=out))


def _attention_products(q_BTHD: Tensor, window: int | None) -> int:
    """Return the multiply-adds of one product of all visible pairs, each D long; a forward pass has two, backward five.

    The forward pass multiplies queries with keys and probabilities with values. A flash backward pass has five such
    products, one of which is the forward pass's scores again (Dao, arXiv:2307.08691).
    """
    B, T, H, D = q_BTHD.shape
    return B * H * D * visible_pairs(T, window)


def _block_products(q_BTHD: Tensor, keys: Tensor) -> int:
    """Return the same of queries that see all keys."""
    return q_BTHD.numel() * keys.shape[1]


def _grouped(a: Tensor, b: Tensor) -> int:
    """Return the FLOPs of torch's grouped product: rows by the matrices of their group, or a sum over rows per group.

    Either [N, K] by [E, K, M], each row once; or [K, N] by [N, M], the gradient of the weights, [E, K, M].
    """
    if a.dim() == 2:
        return 2 * a.shape[0] * a.shape[1] * b.shape[-1]
    return 2 * math.prod(a.shape) * b.shape[-1]
