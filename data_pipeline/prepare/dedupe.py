"""Prepared parts into one dataset: copies of earlier documents are taken out, held-out documents brought together."""

import bisect
import itertools
from collections import Counter
from pathlib import Path

import numpy as np

from data_pipeline.disk import link_or_copy, move
from data_pipeline.prepare.part import HASHES, PreparedPart, hashes_path
from data_pipeline.prepare.rules import Rules
from data_pipeline.shards.held_out import are_held_out
from data_pipeline.shards.manifest import Shard
from data_pipeline.shards.megatron import IndexedReader, data_path, index_path
from data_pipeline.shards.writer import SplitWriter


def assemble_splits(
    folder: Path, final: Path, parts: list[PreparedPart], rules: Rules, dtype: np.dtype
) -> tuple[dict[str, list[Shard]], dict[str, int]]:
    """Write the shards of the whole dataset.

    Training shards that no duplicate of another part touches are the files of the part, linked.

    Args:
        folder: Where the prepared parts are.
        final: Where the shards go.
        parts: The prepared parts, in the order of their sources.
        rules: What the parts were prepared by.
        dtype: The type of the token ids.

    Returns:
        The shards of each split, and the numbers of documents that were dropped, by reason.
    """
    counted = sum((Counter(part.dropped) for part in parts), Counter[str]())
    drops = find_duplicates(folder, parts) if rules.deduplicate else {}
    counted["duplicate"] += sum(map(len, drops.values()))
    dropped = {"empty": 0, "duplicate": 0} | dict(sorted(counted.items()))
    if rules.max_documents is not None:
        drops = _drop_beyond(parts, drops, rules.max_documents)
    train: list[Shard] = []
    held_out = SplitWriter(final, "validation", dtype, rules.shard_tokens)
    none = np.empty(0, np.uint32)
    for index, part in enumerate(parts):
        drop = drops.get(index, none)
        if part.shards["validation"]:
            places = _kept_documents(folder, part, drop, rules.validation_fraction, "validation")
            _copy_documents(folder, part.shards["validation"], places, held_out)
        if len(drop):
            places = _kept_documents(folder, part, drop, rules.validation_fraction, "train")
            writer = SplitWriter(final, "rewritten", dtype, rules.shard_tokens, part.source)
            _copy_documents(folder, part.shards["train"], places, writer)
            shards, place = writer.close(), final
        else:
            shards, place = part.shards["train"], folder
        for shard in shards:
            name = f"train-{len(train):05d}"
            for path in (data_path, index_path):
                (link_or_copy if place == folder else move)(path(place / shard.name), path(final / name))
            train.append(Shard(**vars(shard) | {"name": name}))
    return {"train": train, "validation": held_out.close()}, dropped


def _drop_beyond(parts: list[PreparedPart], drops: dict[int, np.ndarray], most: int) -> dict[int, np.ndarray]:
    """Also drop all documents after the first `most` that are left."""
    cut = {}
    for index, part in enumerate(parts):
        keep = np.ones(part.documents, bool)
        keep[drops.get(index, [])] = False
        order = np.cumsum(keep)
        keep &= order <= most
        most -= int(keep.sum())
        if not keep.all():
            cut[index] = np.flatnonzero(~keep).astype(np.uint32)
    return cut


def find_duplicates(
    directory: Path, parts: list[PreparedPart], *, documents_at_once: int = 1 << 22
) -> dict[int, np.ndarray]:
    """Find the documents that an earlier part holds already.

    Args:
        directory: Where the hashes of the parts are.
        parts: The prepared parts in order. A file that is named twice is two parts of one key.
        documents_at_once: How many documents are compared together, so that memory, about 100 bytes for each, does not
            grow with the corpus.

    Returns:
        The places of such documents within their part, ascending, by the index of the part.
    """
    total = sum(part.documents for part in parts)
    # The hashes of a part are sorted, so the documents whose hashes lie in one range are a slice of each part.
    bounds = np.linspace(0.0, 2.0**64, max(1, -(-total // documents_at_once)) + 1)
    found: dict[int, list[np.ndarray]] = {}
    filled = [(index, part) for index, part in enumerate(parts) if part.documents]
    for low, high in itertools.pairwise(bounds):
        slices, owners = [], []
        for index, part in filled:
            mapped = np.memmap(hashes_path(directory, part.key), HASHES, mode="r")
            start, stop = (_first_from(mapped, int(bound)) for bound in (low, high))
            slices.append(np.array(mapped[start:stop]))
            owners.append(np.full(stop - start, index, np.int32))
        if not slices:
            break
        table, owner = np.concatenate(slices), np.concatenate(owners)
        order = np.lexsort((owner, table["low"], table["high"]))
        table, owner = table[order], owner[order]
        again = np.flatnonzero((table["high"][1:] == table["high"][:-1]) & (table["low"][1:] == table["low"][:-1])) + 1
        for index in np.unique(owner[again]).tolist():
            found.setdefault(index, []).append(table["place"][again[owner[again] == index]])
    return {index: np.sort(np.concatenate(places)) for index, places in found.items()}


def _first_from(table: np.ndarray, high: int) -> int:
    """Return the place of the first hash that is not below `high`.

    numpy's own search would copy the whole column out of the map.
    """
    return bisect.bisect_left(range(len(table)), high, key=lambda i: int(table[i]["high"]))


def _kept_documents(directory: Path, part: PreparedPart, drop: np.ndarray, fraction: float, split: str) -> np.ndarray:
    """Return the places, among the documents of one split of a part, of those that are not dropped.

    Args:
        directory: Where the hashes of the part are.
        part: The part.
        drop: Places among all documents of the part, ascending.
        fraction: The share of the documents that is held out.
        split: "train" or "validation".
    """
    table = np.fromfile(hashes_path(directory, part.key), HASHES)
    high = np.empty(len(table), np.uint64)
    high[table["place"]] = table["high"]
    mine = are_held_out(high, fraction) == (split == "validation")
    keep = np.ones(len(table), bool)
    keep[drop] = False
    return np.flatnonzero(keep[mine])


def _copy_documents(directory: Path, shards: list[Shard], places: np.ndarray, writer: SplitWriter) -> None:
    """Add the documents at `places`, ascending, of shards that follow each other."""
    first = 0
    for shard in shards:
        reader = IndexedReader(directory / shard.name)
        ends = np.cumsum(reader.lengths, dtype=np.int64)
        mine = places[(places >= first) & (places < first + len(reader))] - first
        for run in np.split(mine, np.flatnonzero(np.diff(mine) != 1) + 1):
            if len(run):
                start = int(ends[run[0]] - reader.lengths[run[0]])
                tokens = reader.file.read(start, int(ends[run[-1]]) - start)
                writer.add_documents(tokens, reader.lengths[run[0] : run[-1] + 1])
        first += len(reader)
