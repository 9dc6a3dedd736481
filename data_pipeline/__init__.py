"""Text to tokens to memory-mapped shards to batches. This package knows nothing about models.

Names load on first use: preparing data then needs neither torch nor its import time, and `python -m
data_pipeline.prepare` runs one copy of its module.
"""

from importlib import import_module

_HOME = {
    "BatchLoader": "batches.loader",
    "BestFitDataset": "batches.documents",
    "DocumentDataset": "batches.documents",
    "MixtureDataset": "batches.mixture",
    "Stage": "batches.mixture_plan",
    "TokenDataset": "batches.contiguous",
    "open_dataset": "batches.documents",
    "validation_batches": "batches.loader",
    "IndexedReader": "shards.megatron",
    "IndexedWriter": "shards.megatron",
    "Manifest": "shards.manifest",
    "RawReader": "shards.raw",
    "SplitWriter": "shards.writer",
    "Tokenizer": "tokenizer.tokenizer",
    "WeightedDataset": "batches.mixture",
    "check_content": "shards.checksums",
    "load_tokenizer": "tokenizer.published",
    "open_source": "corpora.sources",
    "record_content": "shards.checksums",
}

__all__ = sorted(_HOME)


_FORMER_NAMES = {"Source": "WeightedDataset"}


def __getattr__(name: str):
    name = _FORMER_NAMES.get(name, name)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
