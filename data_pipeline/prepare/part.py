"""One part of a source as finished shards: read, filtered, tokenized and written by one process.

A piece is a set of files that appear one after the other, each whole, synced and by renaming; its record, KEY.json,
comes last and says that it is complete. KEY is a hash of everything that its bytes depend on, so that a run that was
killed, or one with other sources, takes over what fits.
"""

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_pipeline.corpora.part import Part
from data_pipeline.corpora.records import Malformed
from data_pipeline.disk import write_file_atomically
from data_pipeline.prepare.rules import Rules, apply_rules, load_filter
from data_pipeline.shards.manifest import SPLITS, Shard
from data_pipeline.shards.megatron import data_path, index_path, token_dtype
from data_pipeline.shards.writer import SplitWriter
from data_pipeline.tokenizer.tokenizer import Tokenizer, repaired

VERSION = 2
# Of each document: the first 16 bytes of its SHA-256 as two numbers, and its place among the documents of the piece.
HASHES = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u4")])
MAX_EXAMPLES = 1000
_HOPELESS = 100  # records, all malformed: a wrong column, not bad luck
_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 4096


def piece_key(part: Part, rules: Rules, tokenizer: Tokenizer) -> str:
    """Names a piece by all that its bytes depend on."""
    fields = [VERSION, part.fingerprint, rules.fingerprint(), tokenizer.sha256]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


@dataclass
class Piece:
    """The record of a finished piece.

    source: the part's name. shards: by split. records: all that were read. dropped, irregular: counts by reason.
    malformed: count; examples: of these, with file and line, the first 1,000. sizes: bytes of every file of the piece.
    """

    key: str
    source: str
    records: int
    documents: int
    shards: dict[str, list[Shard]]
    dropped: dict[str, int]
    irregular: dict[str, int]
    malformed: int
    examples: list[str]
    sizes: dict[str, int]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shards in self.shards.values() for shard in shards)

    @classmethod
    def read(cls, directory: Path, key: str) -> "Piece | None":
        """The piece of this key if it is complete in `directory`."""
        try:
            fields = json.loads((directory / f"{key}.json").read_bytes())
            shards = {split: [Shard(**shard) for shard in fields["shards"][split]] for split in SPLITS}
            piece = cls(**fields | {"shards": shards})
            complete = all((directory / name).stat().st_size == size for name, size in piece.sizes.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return piece if complete and piece.key == key else None


def hashes_path(directory: Path, key: str) -> Path:
    return directory / f"{key}.hashes"


def make_piece(
    directory: Path,
    part: Part,
    key: str,
    rules: Rules,
    tokenizer: Tokenizer,
    progress: Callable[[int, int], None] = lambda documents, tokens: None,
) -> Piece:
    """Write the piece of a part into `directory`.

    key: its `piece_key`. progress: called with the numbers of documents and tokens since its last call.
    Raises ValueError when the part cannot be read, or nothing but malformed records is found; OSError when the piece
    cannot be written.
    """
    dtype = token_dtype(tokenizer.n_vocab)
    rules.check_filters()
    writers = {
        split: SplitWriter(directory, f"{key}-{split}", dtype, rules.shard_tokens, part.name) for split in SPLITS
    }
    batches: dict[str, list[str]] = {split: [] for split in SPLITS}
    filters = [(name, load_filter(name)) for name in rules.filters]
    dropped: Counter[str] = Counter()
    irregular_before = tokenizer.irregular.copy()
    seen: set[bytes] = set()
    hashes: list[bytes] = []
    examples: list[str] = []
    records = malformed = characters = waiting = 0

    def write() -> None:
        nonlocal characters, waiting
        tokens_written = 0
        for split, texts in batches.items():
            if texts:
                tokens, lengths = tokenizer.encode_documents(texts, dtype)
                writers[split].add_documents(tokens, lengths)
                tokens_written += len(tokens)
                texts.clear()
        progress(waiting, tokens_written)
        characters = waiting = 0

    for record in part.read():
        records += 1
        if isinstance(record, Malformed):
            malformed += 1
            if len(examples) < MAX_EXAMPLES:
                examples.append(str(record))
            if malformed == records == _HOPELESS:
                raise ValueError(f"{record} (and so are all of the first {_HOPELESS} records)")
            continue
        text, reason = apply_rules(record, rules, filters)
        if reason:
            dropped[reason] += 1
            continue
        try:
            data = text.encode()
        except UnicodeEncodeError:  # before it is hashed: two texts that become the same tokens are one document
            text = repaired(text)
            data = text.encode()
            tokenizer.irregular["repaired"] += 1
        digest = hashlib.sha256(data).digest()
        if rules.deduplicate:
            if digest[:16] in seen:
                dropped["duplicate"] += 1
                continue
            seen.add(digest[:16])
        hashes.append(digest[:16])
        held_out = int.from_bytes(digest[:8], "big") / 2**64 < rules.validation_fraction
        batches["validation" if held_out else "train"].append(text)
        characters, waiting = characters + len(text), waiting + 1
        if characters >= _BATCH_CHARACTERS or waiting >= _BATCH_DOCUMENTS:
            write()
        if rules.max_documents is not None and len(hashes) >= rules.max_documents:
            break
    write()
    _write_hashes(hashes_path(directory, key), hashes)
    shards = {split: writer.close() for split, writer in writers.items()}
    files = [hashes_path(directory, key)]
    for shard in (shard for found in shards.values() for shard in found):
        files += [data_path(directory / shard.name), index_path(directory / shard.name)]
    piece = Piece(
        key=key,
        source=part.name,
        records=records,
        documents=len(hashes),
        shards=shards,
        dropped=dict(dropped),
        irregular=dict(tokenizer.irregular - irregular_before),
        malformed=malformed,
        examples=examples,
        sizes={path.name: path.stat().st_size for path in files},
    )
    write_file_atomically(directory / f"{key}.json", json.dumps(asdict(piece)).encode())
    return piece


def _write_hashes(path: Path, digests: list[bytes]) -> None:
    numbers = np.frombuffer(b"".join(digests), dtype=[("high", ">u8"), ("low", ">u8")])
    table = np.empty(len(numbers), HASHES)
    table["high"], table["low"], table["place"] = numbers["high"], numbers["low"], np.arange(len(numbers))
    write_file_atomically(path, table[np.argsort(table["high"], kind="stable")].tobytes())


def finished_keys(directory: Path) -> set[str]:
    """Keys of the pieces whose records are there."""
    return {path.stem for path in directory.glob("*.json") if re.fullmatch("[0-9a-f]{32}", path.stem)}


def sweep(directory: Path) -> None:
    """Remove what killed processes left under temporary names."""
    for path in directory.glob(".*"):
        with contextlib.suppress(OSError):
            path.unlink()
