"""Which documents are held out for validation: the one rule, for all who divide documents.

The first 8 bytes of the SHA-256 of a document's text, as a share of 2^64, are its place in [0, 1). Documents whose
place is below the validation fraction are held out. So no text is in both splits, whoever divides it and when, and a
larger fraction holds out the same documents and more.
"""

import numpy as np


def place_of(digest: bytes) -> float:
    """Return the place of a document in [0, 1) by the SHA-256 of its text."""
    return int.from_bytes(digest[:8], "big") / 2**64


def places_of(high: np.ndarray) -> np.ndarray:
    """Return the places of many documents, float64, the same numbers as those of `place_of`.

    Args:
        high: The first 8 bytes of each document's SHA-256, as big-endian numbers, uint64.
    """
    return high.astype(np.float64) / 2.0**64


def is_held_out(digest: bytes, fraction: float) -> bool:
    """Return whether a document is held out when the validation fraction is `fraction`."""
    return place_of(digest) < fraction


def are_held_out(high: np.ndarray, fraction: float) -> np.ndarray:
    """Return which of many documents are held out, bool; `high` is that of `places_of`."""
    return places_of(high) < fraction
