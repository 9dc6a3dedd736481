"""Divide a dataset anew: with another share of validation, or into parts to send to different places.

python -m data_pipeline.split data/corpus --output data/corpus5 --validation-fraction 0.05
python -m data_pipeline.split data/corpus --output data/parts --parts 8
"""

import hashlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.command_line import MISTAKE, Program, option, positional, print_line, ranged, run
from data_pipeline.disk import publish, staging_directory, write_file_atomically
from data_pipeline.shards.checksums import check_content, record_content
from data_pipeline.shards.held_out import are_held_out
from data_pipeline.shards.manifest import FILE_NAME, SPLITS, Manifest, open_shards
from data_pipeline.shards.megatron import token_dtype
from data_pipeline.shards.output import new_output
from data_pipeline.shards.writer import SplitWriter, document_batches
from data_pipeline.tokenizer.tokenizer import Tokenizer


def split_by_hash(
    directory: str | Path,
    output: str | Path,
    *,
    validation_fraction: float,
    shard_tokens: int = 1 << 26,
    report: Callable[[str], None] = print,
) -> Manifest:
    """Write all documents of a dataset, those of training first, as a dataset with other splits.

    The rule is that of `prepare`, the SHA-256 of a document's text, so a document falls on the same side here and
    there. The output is Megatron shards, whatever the storage of the input.

    Args:
        directory: The dataset.
        output: The directory of the new one, which appears whole or not at all.
        validation_fraction: The share of the documents that is held out.
        shard_tokens: The most tokens of a shard.
        report: Takes lines for people.

    Returns:
        The manifest of the new dataset.

    Raises:
        ValueError: An argument is bad, or the dataset is damaged. The message is one line with the remedy.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction {validation_fraction}: must be at least 0 and less than 1")
    manifest, tokenizer, output = _open_input(directory, output, shard_tokens)
    with staging_directory(output) as staging:
        new_output(output)  # another process may have finished meanwhile
        writers = _writers(staging, tokenizer, shard_tokens)
        for split in manifest.splits:
            for tokens, lengths in _documents(directory, manifest, split):
                held_out = are_held_out(_digest_numbers(tokenizer, tokens, lengths), validation_fraction)
                for name, chosen in (("train", ~held_out), ("validation", held_out)):
                    writers[name].add_documents(tokens[np.repeat(chosen, lengths)], lengths[chosen])
        written = _complete(staging, manifest, tokenizer, writers)
        if not written.splits["train"]:
            raise ValueError(
                f"validation_fraction {validation_fraction}: leaves no document for training; use a smaller one"
            )
        publish(staging, output)
    _report(output, written, report)
    if validation_fraction and not written.splits["validation"]:
        report(
            "warning: no document fell into the validation split, which is decided by their texts; train with "
            f"--validation.every 0, or split into another folder with a larger --validation-fraction than "
            f"{validation_fraction:g}"
        )
    return written


def split_into_parts(
    directory: str | Path,
    output: str | Path,
    *,
    parts: int,
    shard_tokens: int = 1 << 26,
    report: Callable[[str], None] = print,
) -> list[Manifest]:
    """Write OUTPUT/part-00000, ...: datasets of contiguous documents that have about as many tokens each.

    Training and validation are divided alike. What the manifest counts of documents that were dropped or treated is not
    known by part: the first part has these counts, so that all parts together have those of the whole.

    Args:
        directory: The dataset.
        output: The directory of the parts, which appears whole or not at all.
        parts: How many there are.
        shard_tokens: The most tokens of a shard.
        report: Takes lines for people.

    Returns:
        The manifests of the parts.

    Raises:
        ValueError: An argument is bad, the dataset is damaged, or it has too few documents for every part to get one to
            train on. The message is one line with the remedy.
    """
    if parts < 1:
        raise ValueError(f"parts {parts}: must be at least 1")
    manifest, tokenizer, output = _open_input(directory, output, shard_tokens)
    too_many = f"{directory}: {parts} parts would not all get a document to train on; use fewer --parts"
    if parts > manifest.documents("train"):
        raise ValueError(too_many)
    written: list[Manifest] = []
    with staging_directory(output) as staging:
        new_output(output)  # another process may have finished meanwhile
        names = [f"part-{i:05d}" for i in range(parts)]
        writers = []
        for name in names:
            (staging / name).mkdir()
            writers.append(_writers(staging / name, tokenizer, shard_tokens))
        for split in manifest.splits:
            before, total = 0, manifest.tokens(split)
            for tokens, lengths in _documents(directory, manifest, split):
                ends = np.cumsum(lengths, dtype=np.int64)
                # A document belongs to the part in which its first token lies.
                owners = np.minimum((before + ends - lengths) * parts // total, parts - 1)
                for i in np.unique(owners).tolist():
                    chosen = owners == i
                    writers[i][split].add_documents(tokens[np.repeat(chosen, lengths)], lengths[chosen])
                before += int(ends[-1])
        for name, own in zip(names, writers):
            counted = replace(manifest, dropped={}, irregular={}) if written else manifest
            written.append(_complete(staging / name, counted, tokenizer, own))
            if not written[-1].splits["train"]:
                raise ValueError(too_many)
        publish(staging, output)
    for name, part in zip(names, written):
        _report(output / name, part, report)
    return written


def _open_input(directory: str | Path, output: str | Path, shard_tokens: int) -> tuple[Manifest, Tokenizer, Path]:
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens {shard_tokens}: must be at least 1")
    output = new_output(output)
    manifest = Manifest.read(directory)
    check_content(directory, manifest)
    return manifest, Tokenizer.load(directory), output


def _writers(directory: Path, tokenizer: Tokenizer, shard_tokens: int) -> dict[str, SplitWriter]:
    dtype = token_dtype(tokenizer.n_vocab)
    return {split: SplitWriter(directory, split, dtype, shard_tokens) for split in SPLITS}


def _documents(directory: str | Path, manifest: Manifest, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the documents of a split as `document_batches` does; a raw file's last one gets an end-of-text token."""
    eot_id = manifest.tokenizer["eot_id"]
    for reader in open_shards(directory, manifest, split):
        for tokens, lengths in document_batches(reader):
            if tokens[-1] != eot_id:
                tokens, lengths = np.append(tokens, tokens.dtype.type(eot_id)), lengths.copy()
                lengths[-1] += 1
            yield tokens, lengths


def _digest_numbers(tokenizer: Tokenizer, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the first 8 bytes of the SHA-256 of each document's text, as big-endian numbers, uint64 [n]."""
    stops = np.cumsum(lengths, dtype=np.int64)
    digests = (
        hashlib.sha256(tokenizer.decode_bytes(tokens[start : stop - 1])).digest()
        for start, stop in zip((stops - lengths).tolist(), stops.tolist())
    )
    return np.array([int.from_bytes(digest[:8], "big") for digest in digests], np.uint64)


def _complete(directory: Path, manifest: Manifest, tokenizer: Tokenizer, writers: dict[str, SplitWriter]) -> Manifest:
    """Complete the dataset in `directory`, and return its manifest, which is `manifest` but for what has changed."""
    written = replace(
        manifest,
        dtype=token_dtype(tokenizer.n_vocab).name,
        splits={split: writer.close() for split, writer in writers.items()},
        python_version=platform.python_version(),
        storage="megatron",
    )
    tokenizer.save(directory)
    write_file_atomically(directory / FILE_NAME, written.to_json())
    record_content(directory, written)
    return written


def _report(directory: Path, manifest: Manifest, report: Callable[[str], None]) -> None:
    parts = [
        f"{split} {manifest.tokens(split):,} tokens in {manifest.documents(split):,} documents"
        for split in manifest.splits
    ]
    report(f"{directory}: {', '.join(parts)}")


@dataclass
class SplitOptions:
    """Divide a dataset anew: its splits, or into parts."""

    directory: str = positional("DIR")
    """A prepared dataset."""
    output: str = option()
    """Directory to create."""
    validation_fraction: float | None = ranged(None, at_least=0, below=1)
    """Share of the documents held out, by hash as prepare does."""
    parts: int | None = ranged(None, at_least=1)
    """Make this many datasets part-00000, ... of contiguous documents."""
    shard_tokens: int = ranged(1 << 26, at_least=1)
    """Most tokens of a shard file."""

    def __post_init__(self) -> None:
        if (self.validation_fraction is None) == (self.parts is None):
            raise ValueError("--validation-fraction and --parts: give one of them")


def main(argv: list[str] | None = None) -> int:
    """Split what the command line names; return the exit code."""
    return run(Program("python -m data_pipeline.split", failed=MISTAKE), SplitOptions, _split, argv)


def _split(options: SplitOptions) -> None:
    common: dict[str, Any] = {"shard_tokens": options.shard_tokens, "report": print_line}
    if options.parts is not None:
        split_into_parts(options.directory, options.output, parts=options.parts, **common)
    else:
        fraction = options.validation_fraction
        assert fraction is not None, "the options have one of the two"
        split_by_hash(options.directory, options.output, validation_fraction=fraction, **common)
