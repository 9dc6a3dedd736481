"""Text to tokens to memory-mapped shards to batches. Knows nothing about models.

Names load on first use: preparing data then needs neither torch nor its import time, and `python -m
data_pipeline.prepare` runs one copy of its module.
"""

from importlib import import_module

_HOME = {
    "BatchLoader": "loader",
    "BestFitDataset": "packing",
    "DocumentDataset": "packing",
    "MixtureDataset": "mixture",
    "Source": "mixture",
    "Stage": "mixture",
    "TokenDataset": "dataset",
    "open_dataset": "packing",
    "validation_batches": "loader",
    "IndexedReader": "indexed",
    "IndexedWriter": "indexed",
    "Manifest": "manifest",
    "RawReader": "raw",
    "SplitWriter": "shards",
    "Tokenizer": "tokenizer",
    "check_content": "verify",
    "load_tokenizer": "tokenizer",
    "open_source": "sources",
    "record_content": "verify",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
