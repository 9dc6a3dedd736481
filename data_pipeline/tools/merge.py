"""Make one dataset of several.

    python -m data_pipeline.merge data/wiki data/code --output data/both --link

Training stays training and validation stays validation, so a document may not be in the one here and in the other
there: such documents are looked for. (Mixing at training time, with weights, needs no merge.)
"""

import hashlib
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipeline.command_line import MISTAKE, Program, option, positional, print_line, run
from data_pipeline.disk import link as link_file
from data_pipeline.disk import publish, staging_directory, sync_file, write_file_atomically
from data_pipeline.shards.checksums import check_content, record_content
from data_pipeline.shards.manifest import FILE_NAME, SPLITS, Manifest, Shard, open_shard
from data_pipeline.shards.megatron import IndexedReader, IndexedWriter, TokenWriter
from data_pipeline.shards.output import new_output
from data_pipeline.shards.raw import RawReader
from data_pipeline.shards.writer import document_batches, shard_of
from data_pipeline.tokenizer.tokenizer import Tokenizer

_DIGEST = np.dtype("S16")  # numpy strips zero bytes at its end, but all have 16: equal are only equal ones


def merge(
    directories: list[str | Path],
    output: str | Path,
    *,
    link: bool = False,
    drop_leaked: bool = False,
    report: Callable[[str], None] = print,
) -> Manifest:
    """Write all shards of several datasets, in that order and numbered anew, as one dataset.

    Shards without documents are left out, and equal sources are listed once.
    A document is compared by the first 16 bytes of the SHA-256 of its tokens; memory is 16 bytes for each validation
    document. Copies of a document within the training splits stay.

    Args:
        directories: The datasets.
        output: The directory of the new one, which appears whole or not at all.
        link: Make hard links instead of copies; this needs one file system.
        drop_leaked: Leave out training documents that are also in a validation split, and write their shards anew.
        report: Takes lines for people.

    Returns:
        The manifest of the new dataset.

    Raises:
        ValueError: The datasets differ in tokenizer, dtype or storage, one is damaged, or there are leaked documents.
            The message is one line with the remedy.
    """
    output = new_output(output)
    datasets = _read_datasets(directories)
    leaked = _find_leaked(datasets)
    n_leaked = sum(int(mask.sum()) for mask in leaked.values())
    if n_leaked and not drop_leaked:
        (directory, name), mask = next(iter(leaked.items()))
        raise ValueError(
            f"{n_leaked} training documents are also in a validation split, the first is document "
            f"{int(np.argmax(mask))} of {directory / name}; leave them out of training with --drop-leaked"
        )
    with staging_directory(output) as staging:
        new_output(output)  # another process may have finished meanwhile
        splits = {split: _place_split(datasets, split, staging, leaked, link) for split in SPLITS}
        if not splits["train"]:
            reason = (
                "every training document is in a validation split as well" if n_leaked else "there are no documents"
            )
            raise ValueError(f"nothing is left to train on: {reason}")
        manifest = _merged_manifest(datasets, splits, n_leaked)
        Tokenizer.load(datasets[0][0]).save(staging)
        write_file_atomically(staging / FILE_NAME, manifest.to_json())
        record_content(staging, manifest)
        publish(staging, output)
    for split in SPLITS:
        report(
            f"{output}: {split} {manifest.tokens(split):,} tokens in {manifest.documents(split):,} documents, "
            f"{len(splits[split])} shards"
        )
    if n_leaked:
        report(f"{n_leaked:,} training documents left out that are in a validation split")
    return manifest


def _read_datasets(directories: list[str | Path]) -> list[tuple[Path, Manifest]]:
    """Return the datasets, all of which are sound and alike in what has to be."""
    if len({Path(directory).resolve() for directory in directories}) < len(directories):
        raise ValueError("a directory is given twice; to repeat a dataset, mix it in with a weight at training time")
    datasets = [(Path(directory), Manifest.read(directory)) for directory in directories]
    for directory, manifest in datasets:
        _check_alike(directory, manifest, *datasets[0])
        check_content(directory, manifest)
    return datasets


def _check_alike(directory: Path, manifest: Manifest, first_directory: Path, first: Manifest) -> None:
    if manifest.tokenizer["sha256"] != first.tokenizer["sha256"]:
        what, ours, theirs = "tokenizer", manifest.tokenizer["name"], first.tokenizer["name"]
    elif (manifest.storage, manifest.dtype) != (first.storage, first.dtype):
        what, ours, theirs = "storage", f"{manifest.storage} {manifest.dtype}", f"{first.storage} {first.dtype}"
    else:
        return
    raise ValueError(
        f"{directory}: its {what} is {ours} where that of {first_directory} is {theirs}; prepare one of them again"
        + (", or rewrite raw ones with `python -m data_pipeline.split`" if what == "storage" else "")
    )


def _find_leaked(datasets: list[tuple[Path, Manifest]]) -> dict[tuple[Path, str], np.ndarray]:
    """Find the training documents that are in a validation split too.

    Returns:
        bool [documents] for each shard that has any, by directory and name.
    """
    held_out = _validation_digests(datasets)
    leaked = {}
    for directory, manifest in datasets:
        for shard in manifest.splits["train"] if len(held_out) else []:
            masks = [_contains(held_out, digests) for digests in _digests(directory, manifest, shard)]
            if any(mask.any() for mask in masks):
                leaked[directory, shard.name] = np.concatenate(masks)
    return leaked


def _digests(directory: Path, manifest: Manifest, shard: Shard) -> Iterator[np.ndarray]:
    """Yield the digests of the documents in order, S16 [n] at a time.

    The end-of-text token, which the last document of a raw file may lack, does not count.
    """
    end = manifest.tokenizer["eot_id"]
    for tokens, lengths in document_batches(open_shard(directory, manifest, shard)):
        data, size = tokens.data.cast("B"), tokens.itemsize
        stops = np.cumsum(lengths, dtype=np.int64)
        starts, bodies = stops - lengths, stops - (tokens[stops - 1] == end)
        digests = b"".join(
            hashlib.sha256(data[start * size : stop * size]).digest()[:16]
            for start, stop in zip(starts.tolist(), bodies.tolist())
        )
        yield np.frombuffer(digests, _DIGEST)


def _validation_digests(datasets: list[tuple[Path, Manifest]]) -> np.ndarray:
    parts = [
        digests
        for directory, manifest in datasets
        for shard in manifest.splits["validation"]
        for digests in _digests(directory, manifest, shard)
    ]
    return np.sort(np.concatenate([np.empty(0, _DIGEST), *parts]))


def _contains(sorted_digests: np.ndarray, digests: np.ndarray) -> np.ndarray:
    places = np.minimum(np.searchsorted(sorted_digests, digests), len(sorted_digests) - 1)
    return sorted_digests[places] == digests


def _place_split(
    datasets: list[tuple[Path, Manifest]],
    split: str,
    staging: Path,
    leaked: dict[tuple[Path, str], np.ndarray],
    link: bool,
) -> list[Shard]:
    """Put the shards of one split of all datasets into `staging`, and return them."""
    placed: list[Shard] = []
    for directory, manifest in datasets:
        for shard in (shard for shard in manifest.splits[split] if shard.documents):
            suffix = Path(shard.name).suffix if manifest.storage == "raw" else ""
            target = staging / f"{split}-{len(placed):05d}{suffix}"
            mask = leaked.get((directory, shard.name))
            if mask is None or split != "train":
                placed.append(_link_or_copy_shard(directory, manifest, shard, target, link))
            elif not mask.all():
                placed.append(_write_without(open_shard(directory, manifest, shard), mask, target))
    return placed


def _merged_manifest(datasets: list[tuple[Path, Manifest]], splits: dict[str, list[Shard]], n_leaked: int) -> Manifest:
    manifests = [manifest for _, manifest in datasets]
    sources: list[dict] = []
    for source in (source for manifest in manifests for source in manifest.sources):
        sources += [source] if source not in sources else []
    return replace(
        manifests[0],
        splits=splits,
        sources=sources,
        dropped=_sum(manifest.dropped for manifest in manifests) | ({"leaked": n_leaked} if n_leaked else {}),
        irregular=_sum(manifest.irregular for manifest in manifests),
        python_version=platform.python_version(),
    )


def _link_or_copy_shard(directory: Path, manifest: Manifest, shard: Shard, target: Path, link: bool) -> Shard:
    placed = replace(shard, name=target.name)
    hashes = (shard.sha256, shard.index_sha256)
    for old, new, sha256 in zip(manifest.files(shard), manifest.files(placed), hashes):
        source, destination = directory / old, target.with_name(new)
        if not link:
            _copy(source, destination, sha256)
            continue
        try:
            link_file(source, destination)
        except OSError as error:
            raise ValueError(f"{source}: cannot be linked: {error.strerror}; copy, without --link") from error
    return placed


def _copy(source: Path, destination: Path, sha256: str | None) -> None:
    digest = hashlib.sha256()
    with open(source, "rb") as reading, open(destination, "wb") as writing:
        while data := reading.read(4 << 20):
            digest.update(data)
            writing.write(data)
        sync_file(writing)
    if sha256 not in (None, digest.hexdigest()):
        raise ValueError(f"{source}: content differs from {FILE_NAME}; restore it from a good copy")


def _write_without(reader: IndexedReader | RawReader, leaked: np.ndarray, target: Path) -> Shard:
    """Write the documents that are not `leaked` (bool [documents]) as a shard of the same storage."""
    position = 0
    with (TokenWriter if isinstance(reader, RawReader) else IndexedWriter)(target, reader.dtype) as writer:
        for tokens, lengths in document_batches(reader):
            keep = ~leaked[position : position + len(lengths)]
            position += len(lengths)
            kept = tokens[np.repeat(keep, lengths)]
            writer.add_documents(kept, lengths[keep])
    return shard_of(writer)


def _sum(counts: Iterator[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)  # keeps reasons that never happened, which + would not
    return dict(total)


@dataclass
class MergeOptions:
    """Put datasets of one tokenizer together, as one dataset."""

    directories: list[str] = positional("DIR")
    """Prepared datasets."""
    output: str = option()
    """Directory to create."""
    link: bool = False
    """Make hard links instead of copies."""
    drop_leaked: bool = False
    """Leave out training documents that are also in a validation split."""


def main(argv: list[str] | None = None) -> int:
    """Merge what the command line names; return the exit code."""
    return run(Program("python -m data_pipeline.merge", failed=MISTAKE), MergeOptions, _merge, argv)


def _merge(options: MergeOptions) -> None:
    merge(
        list(options.directories),
        options.output,
        link=options.link,
        drop_leaked=options.drop_leaked,
        report=print_line,
    )
