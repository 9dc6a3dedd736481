"""A choice of back ends is one table: what each is called, why it cannot serve, and what it runs.

Whoever offers the choice reads the table: the operation itself, the early refusal of a setting, and error texts. A new
back end is a file with the function and one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

AUTO = "auto"
BF16_ONLY = "computes in bf16 only"
"""A reason that another precision would remove."""


class Backend(NamedTuple):
    """One way to compute an operation."""

    name: str
    why_not: Callable[[torch.dtype, tuple[int, ...], torch.device], str | None]
    """(dtype, sizes, device) -> why it cannot serve operands like these, to be read behind its name; None if it can.
    Each table says which sizes it means."""
    run: Callable[..., Any]


def serves_all(dtype: torch.dtype, sizes: tuple[int, ...], device: torch.device) -> None:
    """Say of a back end without limits that nothing speaks against it."""


def table(*backends: Backend) -> dict[str, Backend]:
    """Return the back ends by name."""
    return {backend.name: backend for backend in backends}


def choose(
    backends: dict[str, Backend],
    name: str,
    order: Sequence[str],
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    device: torch.device,
) -> Backend:
    """Return the back end of this name, or for `auto` the first of `order` that can serve.

    Args:
        backends: The table.
        name: `auto`, or a name in the table.
        order: Names in the table; the last one must serve everything.
        dtype: The type of the operands.
        sizes: The sizes of the operands, as the table means them.
        device: The device of the operands.

    Raises:
        ValueError: There is no back end of this name, or it cannot serve.
    """
    if name == AUTO:
        for candidate in order:
            if backends[candidate].why_not(dtype, sizes, device) is None:
                return backends[candidate]
    if name not in backends:
        raise ValueError(f"backend={name!r} is unknown; choose one of {', '.join((AUTO, *backends))}")
    if reason := backends[name].why_not(dtype, sizes, device):
        raise ValueError(f"backend={name!r} {reason}; use backend={AUTO!r}")
    return backends[name]
