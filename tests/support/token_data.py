"""Datasets of random letters with documents of given lengths."""

from pathlib import Path

import numpy as np

from data_pipeline import IndexedWriter, Manifest, load_tokenizer
from data_pipeline.shards.manifest import Shard


def write_dataset(path: Path, splits: dict, *, seed: int = 0) -> Path:
    """Documents of random letters, of given lengths (end of text included), in two shards per split."""
    tokenizer, generator = load_tokenizer("bytes"), np.random.default_rng(seed)
    shards: dict[str, list[Shard]] = {"train": [], "validation": []}
    for split, lengths in splits.items():
        for number, part in enumerate(np.array_split(np.asarray(lengths), 2)):
            name = f"{split}-{number:05d}"
            with IndexedWriter(path / name, np.dtype("<u2")) as writer:
                tokens = generator.integers(97, 123, int(part.sum())).astype("<u2")
                tokens[np.cumsum(part) - 1] = tokenizer.eot_id
                writer.add_documents(tokens, part)
            shards[split].append(Shard(name, writer.tokens, writer.documents, writer.sha256))
    tokenizer.save(path)
    described = tokenizer.description()
    (path / "manifest.json").write_bytes(Manifest(described, "uint16", shards, [], {}, {}, "3").to_json())
    return path
