"""Settings of the data that a run trains on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.batches import Packing
from data_pipeline.command_line import ranged


@dataclass
class SourceConfig:
    """One dataset of a mixture."""

    path: str
    """Folder with manifest.json."""
    weight: float | None = ranged(None, at_least=0)
    """Its share of the tokens, relative to the other sources'; null is its number of tokens."""
    max_epochs: float | None = ranged(None, above=0)
    """Passes over it, after which its weight falls to the others in proportion; null is no limit."""
    name: str | None = None
    """Name in stages, metrics and messages; null is that of the folder."""

    @property
    def label(self) -> str:
        """Its name in stages, metrics and messages."""
        return self.name or Path(self.path).name


@dataclass
class StageConfig:
    """A change of weights in the course of a run."""

    from_step: int
    """The first optimizer step, counted from 0, that has these weights."""
    weights: dict[str, float] = ranged(at_least=0)
    """Weight by the source's name, in the place of all earlier ones; sources left out are not read."""

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"from_step={self.from_step}"


@dataclass
class DataConfig:
    """Token shards made by `python -m data_pipeline.prepare`."""

    path: str | None = None
    """Folder with manifest.json; null is data/pystdlib, or `sources`."""
    # Not lists: what an item of a list does not say, jsonargparse takes from an earlier list of the same length.
    sources: tuple[SourceConfig, ...] = ()
    """Several such folders, mixed by weight, in the place of `path`."""
    stages: tuple[StageConfig, ...] = ()
    """Curriculum: weights of the sources that replace the first ones at certain steps."""
    change_mixture: bool = False
    """Let a resumed run go on with other sources, weights, limits or stages, each source where it was left."""
    packing: Packing = "contiguous"
    """`contiguous` cuts the text into samples wherever that falls. `best_fit` fills samples with whole documents,
    cutting only those longer than seq_len, with next to no padding (arXiv:2404.10830). `varlen`, for fine-tuning: a
    sample is one document, a micro-batch its documents one after the other without padding. These two always mask."""
    seq_len: int = ranged(1024, above=0)
    """Tokens per sample; with `varlen` at most."""
    document_mask: bool = False
    """Keep attention within documents of a contiguous sample, and do not predict across their borders."""
    workers: int = ranged(1, at_least=0, at_most=1024)
    """Threads that read ahead; 0 reads when asked. The order does not depend on them."""
    prefetch: int = ranged(2, at_least=0, at_most=1024)
    """Optimizer steps to read ahead; 0 reads when asked."""
    verify: Literal["once", "always", "never"] = "once"
    """Before training, compare the data with their checksums: `once` those files that have changed since they were last
    compared, `always` all of them, `never` only their sizes."""

    @property
    def masks_documents(self) -> bool:
        """Whether attention stays within documents."""
        return self.document_mask or self.packing != "contiguous"
