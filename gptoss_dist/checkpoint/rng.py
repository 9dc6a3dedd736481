"""The random generators of a process, as JSON values."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor


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
    """
    path = Path(checkpoint) / f"rng_{rank:05d}.json"
    if not path.is_file():
        return False
    state = json.loads(path.read_text())
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_decode(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))
    return True


def _encode(tensor: Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
