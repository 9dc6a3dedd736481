"""From shards to batches: the order of samples, their packing, mixtures, and the loader."""

from typing import Literal

Packing = Literal["contiguous", "best_fit", "varlen"]
"""How samples are made of documents: the names in `documents.PACKINGS`."""
