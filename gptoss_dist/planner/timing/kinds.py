"""What limits an operator of a trace, and how many bytes it moves.

The recorder counts the bytes of every operand. That is too much where a result is handed in as an argument (`out=`),
and where only some rows of a table are read; `moved_bytes` corrects both.
"""

from __future__ import annotations

import re
from enum import StrEnum

from gptoss_dist.planner.tracing.recorder import Operator, collective_kind


class Kind(StrEnum):
    """Classes of operators that are priced alike."""

    MATRIX = "matrix products"
    GROUPED = "grouped products"
    ATTENTION_FORWARD = "attention, forward"
    ATTENTION_BACKWARD = "attention, backward"
    EXPONENTIAL = "exponentials"
    GATHER = "gathers and scatters"
    SORT = "sorts"
    OPTIMIZER = "optimizer"
    MEMORY = "elementwise and copies"
    COLLECTIVE = "collectives"
    NOTHING = "nothing"
    """Allocations and markers: no kernel."""


_EXPONENTIALS = {"exp", "log", "softmax", "log_softmax", "logsumexp", "sigmoid", "tanh", "sin", "cos"}
_READS_ROWS = {"index_select", "embedding", "gather", "index"}
_WRITES_ROWS = {"scatter", "scatter_add", "index_copy", "index_add", "index_put"}
_MOVES_ROWS = {"embedding_bag", "embedding_bag_forward_only", "embedding_dense_backward"}
_SORTS = {"sort", "argsort", "topk"}
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "promote_types", "detach"}


def base_name(operator: Operator) -> str:
    """Return the plain name of an operator: `aten._softmax.default` and `aten.softmax.int_out` are both `softmax`."""
    return operator.name.split(".")[1].strip("_")


def kind_of(operator: Operator) -> Kind:
    """Return the class of an operator."""
    namespace = operator.name.split(".", 1)[0]
    name = base_name(operator)
    if operator.group or namespace == "c10d":
        return Kind.COLLECTIVE
    if namespace == "profiler" or name in _NO_KERNEL:
        return Kind.NOTHING
    if "attention" in name:
        return Kind.ATTENTION_BACKWARD if "backward" in name else Kind.ATTENTION_FORWARD
    if operator.flops:
        return Kind.GROUPED if "grouped" in name else Kind.MATRIX
    if name.startswith("fused_adam"):
        return Kind.OPTIMIZER
    if name in _EXPONENTIALS:
        return Kind.EXPONENTIAL
    if name in _READS_ROWS | _WRITES_ROWS | _MOVES_ROWS:
        return Kind.GATHER
    return Kind.SORT if name in _SORTS else Kind.MEMORY


def label_of(operator: Operator) -> str:
    """Return the class of an operator in words; of a collective which one, such as `all-gather`."""
    kind = kind_of(operator)
    return collective_kind(operator.name.split(".")[1]) if kind is Kind.COLLECTIVE else str(kind)


def moved_bytes(operator: Operator) -> float:
    """Return the bytes that one call reads from memory and writes to it."""
    read, written, name = operator.read, operator.written, base_name(operator)
    if name in _READS_ROWS:
        return 2 * written
    if name in _WRITES_ROWS:
        return 2 * max(read - written, 0)
    if name.startswith("fused_adam"):
        # Weights, gradients and two moments are read; all but the gradients, declared mutable too, are written.
        return read + 0.75 * written
    if name in ("copy", "foreach_copy", "split_with_sizes_copy", "chunk_cat") or _hands_in_result(operator):
        return read
    return read + written


def _hands_in_result(operator: Operator) -> bool:
    overload = operator.name.split(".")[-1]
    return bool(re.search(r"(^|_)out$|^grad_input$", overload))


def elements(operator: Operator) -> int:
    """Return how many numbers an elementwise operator reads, of its largest operand."""
    most = 0
    for shape in operator.shapes:
        count = 1
        for size in shape:
            count *= size
        most = max(most, count)
    return most
