"""Finished pieces into one dataset: copies of earlier documents taken out, what is held out brought together."""

import bisect
import itertools
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from data_pipeline.prepare.part import HASHES, Piece, hashes_path
from data_pipeline.prepare.rules import Rules, in_validation
from data_pipeline.shards.manifest import Shard
from data_pipeline.shards.megatron import IndexedReader, data_path, index_path
from data_pipeline.shards.writer import SplitWriter


def gather(
    folder: Path, final: Path, pieces: list[Piece], rules: Rules, dtype: np.dtype
) -> tuple[dict[str, list[Shard]], dict[str, int]]:
    """The shards of the dataset, in `final`; and what was dropped, by reason.

    Training shards that are not touched by duplicates of other pieces are the files of the pieces, linked.
    """
    dropped = sum((Counter(piece.dropped) for piece in pieces), Counter())
    drops = duplicates(folder, pieces) if rules.deduplicate else {}
    dropped["duplicate"] += sum(map(len, drops.values()))
    dropped = {"empty": 0, "duplicate": 0} | dict(sorted(dropped.items()))
    if rules.max_documents is not None:
        drops = _drop_beyond(pieces, drops, rules.max_documents)
    train: list[Shard] = []
    held_out = SplitWriter(final, "validation", dtype, rules.shard_tokens)
    none = np.empty(0, np.uint32)
    for index, piece in enumerate(pieces):
        drop = drops.get(index, none)
        if piece.shards["validation"]:
            places = _kept_documents(folder, piece, drop, rules.validation_fraction, "validation")
            _copy_documents(folder, piece.shards["validation"], places, held_out)
        if len(drop):
            places = _kept_documents(folder, piece, drop, rules.validation_fraction, "train")
            writer = SplitWriter(final, "rewritten", dtype, rules.shard_tokens, piece.source)
            _copy_documents(folder, piece.shards["train"], places, writer)
            shards, place = writer.close(), final
        else:
            shards, place = piece.shards["train"], folder
        for shard in shards:
            name = f"train-{len(train):05d}"
            for path in (data_path, index_path):
                (_link if place == folder else os.rename)(path(place / shard.name), path(final / name))
            train.append(Shard(**vars(shard) | {"name": name}))
    return {"train": train, "validation": held_out.close()}, dropped


def _drop_beyond(pieces: list[Piece], drops: dict[int, np.ndarray], most: int) -> dict[int, np.ndarray]:
    """Also drop all documents after the first `most` that are left."""
    cut = {}
    for index, piece in enumerate(pieces):
        keep = np.ones(piece.documents, bool)
        keep[drops.get(index, [])] = False
        order = np.cumsum(keep)
        keep &= order <= most
        most -= int(keep.sum())
        if not keep.all():
            cut[index] = np.flatnonzero(~keep).astype(np.uint32)
    return cut


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def duplicates(directory: Path, pieces: list[Piece], *, bucket: int = 1 << 22) -> dict[int, np.ndarray]:
    """Places, by index of the piece, of documents that an earlier piece holds already. A file that is named twice is
    two pieces of one key.

    bucket: documents looked at together, so that memory (about 100 bytes each) does not grow with the corpus.
    """
    total = sum(piece.documents for piece in pieces)
    # Pieces are sorted by hash, so the documents whose hashes lie in one range are a slice of each.
    bounds = np.linspace(0.0, 2.0**64, max(1, -(-total // bucket)) + 1)
    found: dict[int, list[np.ndarray]] = {}
    filled = [(index, piece) for index, piece in enumerate(pieces) if piece.documents]
    for low, high in itertools.pairwise(bounds):
        slices, owners = [], []
        for index, piece in filled:
            table = np.memmap(hashes_path(directory, piece.key), HASHES, mode="r")
            start, stop = (_first_from(table, int(bound)) for bound in (low, high))
            slices.append(np.array(table[start:stop]))
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
    """Place of the first hash that is not below. numpy's search would copy the whole column out of the map."""
    return bisect.bisect_left(range(len(table)), high, key=lambda i: int(table[i]["high"]))


def _kept_documents(directory: Path, piece: Piece, drop: np.ndarray, fraction: float, split: str) -> np.ndarray:
    """Places, among this split's documents in the piece, of those that are not dropped.

    drop: places among all documents of the piece, sorted.
    """
    table = np.fromfile(hashes_path(directory, piece.key), HASHES)
    high = np.empty(len(table), np.uint64)
    high[table["place"]] = table["high"]
    mine = in_validation(high, fraction) == (split == "validation")
    keep = np.ones(len(table), bool)
    keep[drop] = False
    return np.flatnonzero(keep[mine])


def _copy_documents(directory: Path, shards: list[Shard], places: np.ndarray, writer: SplitWriter) -> None:
    """Add the documents at `places`, sorted, of shards that follow each other."""
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
