"""The random generators of a process, as JSON values."""

from __future__ import annotations

import base64
import os
import random
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import torch
from torch import Tensor

from data_pipeline.foreign import file_inside, read_json
from data_pipeline.printable import printable

_REMEDY = "restore the checkpoint from a good copy, or take another one"


class _State(msgspec.Struct):
    """What `rng_state` returns."""

    python: tuple[int, list[int], float | None]
    numpy: tuple[str, list[int], int, int, float]
    torch: str
    cuda: str | None = None


def rng_state() -> dict:
    """Return the states of the generators of python, numpy and torch as JSON values."""
    version, keys, gauss = random.getstate()
    name, array, position, has_gauss, cached = cast(tuple, np.random.get_state())
    state = {
        "python": [version, list(keys), gauss],
        "numpy": [name, array.tolist(), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def restore_rng(checkpoint: str | Path, rank: int) -> bool:
    """Restore the generators of a rank.

    Returns:
        False if the checkpoint has none for this rank, because fewer ranks wrote it.

    Raises:
        ValueError: The file of this rank is damaged.
    """
    file = f"rng_{rank:05d}.json"
    if not os.path.lexists(Path(checkpoint) / file):
        return False
    path = file_inside(checkpoint, file)
    state = read_json(path, _State, remedy=_REMEDY)
    version, keys, gauss = state.python
    try:
        random.setstate((version, tuple(keys), gauss))
        name, array, position, has_gauss, cached = state.numpy
        np.random.set_state((name, np.array(array, np.uint32), position, has_gauss, cached))
        torch.set_rng_state(_decode(state.torch))
        if state.cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(_decode(state.cuda))
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # each generator has its own
        reason = printable(" ".join(str(error).split()))
        raise ValueError(f"{path} holds no state of a random generator: {reason}; {_REMEDY}") from None
    return True


def _encode(tensor: Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
