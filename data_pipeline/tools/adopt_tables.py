"""Token ids in tables, such as the column `input_ids` of a Hugging Face dataset, as shards beside them.

Training reads files of ids alone, and a table holds them between other things. So the ids are copied once; the tables
stay as they are, and may be deleted.
"""

import filecmp
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.corpora.columns import Column, Malformed
from data_pipeline.corpora.kinds import TABLE_SUFFIXES
from data_pipeline.corpora.saved import is_saved, saved_files
from data_pipeline.corpora.tables import read_arrow, read_parquet
from data_pipeline.disk import move
from data_pipeline.printable import shown
from data_pipeline.shards.manifest import Shard
from data_pipeline.shards.megatron import data_path, index_path, token_dtype
from data_pipeline.shards.writer import SplitWriter, documents_of_ids
from data_pipeline.tokenizer.tokenizer import Tokenizer

_SHARD_TOKENS = 1 << 26


def is_table(path: Path) -> bool:
    """Return whether a file is a table, by its name."""
    return path.suffix.lower() in TABLE_SUFFIXES


def tables_in(path: Path) -> list[Path]:
    """Return the tables of a folder of `save_to_disk`, of one split; none where it is another folder."""
    return [Path(file.path) for file in saved_files(path, None)[0]] if path.is_dir() and is_saved(path) else []


def copy_ids(
    directory: Path, staging: Path, tables: dict[str, list[Path]], column: str, tokenizer: Tokenizer
) -> dict[str, list[Shard]]:
    """Write the ids of tables as shards SPLIT-00000, ... in `directory`, all of them or none.

    Args:
        directory: Where the shards go.
        staging: Where they are until all are whole, on the same file system.
        tables: The tables of each split, in order.
        column: The column that holds lists of ids.
        tokenizer: What made them.

    Returns:
        The shards of each split.

    Raises:
        ValueError: A row holds no ids of the tokenizer, a table cannot be read, or another file has a shard's name.
    """
    splits = {}
    for split, paths in tables.items():
        writer = SplitWriter(staging, split, token_dtype(tokenizer.n_vocab), _SHARD_TOKENS)
        for path in paths:
            for documents in _documents(path, column, tokenizer):
                lengths = [len(document) for document in documents]
                writer.add_documents(np.concatenate(documents), lengths)
        splits[split] = writer.close()
    if not splits["train"]:
        raise ValueError(f"{directory}: no document for training in column {column!r} of its tables")
    shards = [shard for listed in splits.values() for shard in listed]
    files = [of(shard.name).name for shard in shards for of in (data_path, index_path)]
    for name in files:
        # What an adoption that was killed here left is the same.
        if (directory / name).exists() and not filecmp.cmp(staging / name, directory / name, shallow=False):
            raise ValueError(f"{directory / name}: is in the way of a shard; move it away")
    for name in files:
        move(staging / name, directory / name)
    return splits


def _documents(path: Path, column: str, tokenizer: Tokenizer) -> Iterator[list[np.ndarray]]:
    """Yield the documents of some rows at a time, each ended by end-of-text."""
    wanted = Column(column, ids=True)
    rows = read_arrow(str(path), wanted) if path.suffix == ".arrow" else read_parquet(str(path), None, wanted)
    waiting: list[np.ndarray] = []
    tokens = 0
    for row, ids in enumerate(rows, 1):
        if isinstance(ids, Malformed):
            raise ValueError(str(ids))
        assert not isinstance(ids, str), "a column of ids"
        try:
            waiting += documents_of_ids(ids, tokenizer)
        except ValueError as error:
            raise ValueError(f"{shown(str(path))}, row {row}: {error}") from error
        tokens += len(ids)
        if tokens >= 1 << 20:
            yield waiting
            waiting, tokens = [], 0
    if waiting:
        yield waiting
