"""One part of a source as finished shards: read, filtered, tokenized and written by one process.

A prepared part is a set of files that appear one after the other, each of them whole, synced and by renaming. Its
record, KEY.json, comes last and says that it is complete. KEY is a hash of everything that the bytes of the part depend
on, so a run that was killed, or a run with other sources, takes over the parts that fit.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_pipeline.corpora.columns import Malformed
from data_pipeline.corpora.part import Part
from data_pipeline.disk import remove_own_unfinished, write_file_atomically
from data_pipeline.foreign import Count, read_json
from data_pipeline.prepare.rules import Rules, apply_rules, load_filter
from data_pipeline.shards.held_out import is_held_out
from data_pipeline.shards.manifest import SPLITS, Shard
from data_pipeline.shards.megatron import data_path, index_path, token_dtype
from data_pipeline.shards.writer import SplitWriter, documents_of_ids
from data_pipeline.tokenizer.tokenizer import Tokenizer, repaired

VERSION = 3
# Of each document: the first 16 bytes of its SHA-256 as two numbers, and its place among the documents of the part.
HASHES = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u4")])
MAX_EXAMPLES = 1000
# Documents are tokenized together until they have so many characters or are so many.
BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 4096
_HOPELESS = 100  # records, all malformed: a wrong column, not bad luck


@dataclass(frozen=True)
class Preparation:
    """What all parts of one preparation have in common."""

    folder: Path
    """Where the prepared parts go."""
    rules: Rules
    tokenizer: Tokenizer


def tokenizer_folder(folder: Path, sha256: str) -> Path:
    """Return where other processes find the tokenizer of a preparation in `folder`, by its SHA-256.

    A preparation with another one may be at work in the same folder.
    """
    return folder / f"tokenizer-{sha256[:16]}"


def part_key(part: Part, rules: Rules, tokenizer: Tokenizer) -> str:
    """Name a prepared part by all that its bytes depend on."""
    fields = [VERSION, part.fingerprint, rules.fingerprint(), tokenizer.sha256]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


@dataclass
class PreparedPart:
    """The record of a part that is complete on disk; its fields are those of KEY.json."""

    key: str
    """What `part_key` says of the part."""
    source: str
    """The name of the part."""
    records: Count
    """How many records were read."""
    documents: Count
    """How many documents were kept."""
    shards: dict[str, list[Shard]]
    """The shards of each split."""
    dropped: dict[str, Count]
    """How many texts were dropped, by reason."""
    irregular: dict[str, Count]
    """How many texts the tokenizer had to treat, by reason."""
    malformed: Count
    """How many records hold no text."""
    examples: list[str]
    """The first 1,000 of these, with file and place."""
    sizes: dict[str, int]
    """Bytes of every file of the part, by name."""

    @classmethod
    def read(cls, directory: Path, key: str) -> "PreparedPart | None":
        """Return the part of this key if it is complete in `directory`."""
        try:
            part = read_json(directory / f"{key}.json", cls)
            complete = all((directory / name).stat().st_size == size for name, size in part.sizes.items())
        except (OSError, ValueError):
            return None
        return part if complete and part.key == key and part.shards.keys() == set(SPLITS) else None


def prepare_part(
    part: Part,
    key: str,
    preparation: Preparation,
    report_progress: Callable[[int, int], None] = lambda documents, tokens: None,
) -> PreparedPart:
    """Write the shards and the record of one part.

    Args:
        part: What is read.
        key: Its `part_key`.
        preparation: Where it goes, by which rules, with which tokenizer.
        report_progress: Called with the numbers of documents and tokens since its last call.

    Returns:
        The record, which is on disk by then, as are the shards.

    Raises:
        ValueError: The part cannot be read, a filter was changed, or the first 100 records are all malformed.
        OSError: The files cannot be written.
    """
    preparation.rules.check_filters()
    writer = _PartWriter(part, key, preparation, report_progress)
    try:
        for record in part.read():
            writer.add(record)
            if writer.is_full:
                break
        return writer.finish()
    except BaseException:  # also a full disk, which has no room for what nobody will finish
        remove_own_unfinished(preparation.folder, key)
        raise


class _PartWriter:
    """A writer of one part: it takes the records, and writes those that are kept as shards of the two splits."""

    def __init__(
        self, part: Part, key: str, preparation: Preparation, report_progress: Callable[[int, int], None]
    ) -> None:
        self.part, self.key, self.report_progress = part, key, report_progress
        self.folder, self.rules, self.tokenizer = preparation.folder, preparation.rules, preparation.tokenizer
        self.dtype = token_dtype(self.tokenizer.n_vocab)
        self.filters = [(name, load_filter(name)) for name in self.rules.filters]
        self.shard_writers = {
            split: SplitWriter(self.folder, f"{key}-{split}", self.dtype, self.rules.shard_tokens, part.name)
            for split in SPLITS
        }
        self.batch: dict[str, list[str | np.ndarray]] = {split: [] for split in SPLITS}
        self.batch_characters = self.batch_documents = 0
        self.records = self.malformed = 0
        self.examples: list[str] = []
        self.dropped: Counter[str] = Counter()
        self.irregular_before = self.tokenizer.irregular.copy()
        self.seen: set[bytes] = set()
        self.hashes: list[bytes] = []

    @property
    def is_full(self) -> bool:
        """Whether the part holds all the documents that the whole dataset may have."""
        return self.rules.max_documents is not None and len(self.hashes) >= self.rules.max_documents

    def add(self, record: str | np.ndarray | Malformed) -> None:
        """Keep the text of a record or its token ids, or count why it is left out."""
        self.records += 1
        if isinstance(record, Malformed):
            self._count_malformed(record)
            return
        if isinstance(record, np.ndarray):
            self._add_ids(record)
            return
        text, reason = apply_rules(record, self.rules, self.filters)
        if reason:
            self.dropped[reason] += 1
            return
        text, digest = self._hash(text)
        self._keep(text, len(text), digest)

    def _add_ids(self, record: np.ndarray) -> None:
        """Keep token ids as they are.

        A document's split, and what is a copy of it, is decided by its text, as everywhere.
        """
        try:
            documents = documents_of_ids(record, self.tokenizer)
            texts = [self.tokenizer.decode_bytes(document[:-1]) for document in documents]
        except ValueError as error:
            raise ValueError(f"{self.part.name}, record {self.records}: {error}") from error
        if not documents:
            self.dropped["empty"] += 1
        for document, text in zip(documents, texts):
            self._keep(document, len(text), hashlib.sha256(text).digest())

    def _keep(self, document: str | np.ndarray, length: int, digest: bytes) -> None:
        """Put a document into its split, unless it is a copy."""
        if self.rules.deduplicate:
            if digest[:16] in self.seen:
                self.dropped["duplicate"] += 1
                return
            self.seen.add(digest[:16])
        self.hashes.append(digest[:16])
        held_out = is_held_out(digest, self.rules.validation_fraction)
        self.batch["validation" if held_out else "train"].append(document)
        self.batch_characters, self.batch_documents = self.batch_characters + length, self.batch_documents + 1
        if self.batch_characters >= BATCH_CHARACTERS or self.batch_documents >= BATCH_DOCUMENTS:
            self.write_batch()

    def write_batch(self) -> None:
        """Tokenize the texts that wait, and add them to the shards."""
        tokens_written = 0
        for split, documents in self.batch.items():
            if documents:
                tokens, lengths = self._tokens_of(documents)
                self.shard_writers[split].add_documents(tokens, lengths)
                tokens_written += len(tokens)
                documents.clear()
        self.report_progress(self.batch_documents, tokens_written)
        self.batch_characters = self.batch_documents = 0

    def _tokens_of(self, documents: list[str | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of documents, each ended by end-of-text, and how many each has."""
        ids = [document for document in documents if isinstance(document, np.ndarray)]
        if not ids:
            texts = [document for document in documents if isinstance(document, str)]
            return self.tokenizer.encode_documents(texts, self.dtype)
        assert len(ids) == len(documents), "a part holds texts or token ids"
        return np.concatenate(ids).astype(self.dtype), np.array([len(document) for document in ids], np.int32)

    def finish(self) -> PreparedPart:
        """Complete the shards, write the hashes, and last the record."""
        self.write_batch()
        shards = {split: writer.close() for split, writer in self.shard_writers.items()}
        hashes = hashes_path(self.folder, self.key)
        write_hashes(hashes, self.hashes)
        files = [hashes]
        for shard in (shard for found in shards.values() for shard in found):
            files += [data_path(self.folder / shard.name), index_path(self.folder / shard.name)]
        prepared = PreparedPart(
            key=self.key,
            source=self.part.name,
            records=self.records,
            documents=len(self.hashes),
            shards=shards,
            dropped=dict(self.dropped),
            irregular=dict(self.tokenizer.irregular - self.irregular_before),
            malformed=self.malformed,
            examples=self.examples,
            sizes={path.name: path.stat().st_size for path in files},
        )
        # A folder that somebody else has finished and removed meanwhile is not made anew.
        write_file_atomically(
            self.folder / f"{self.key}.json", json.dumps(asdict(prepared)).encode(), make_folder=False
        )
        return prepared

    def _count_malformed(self, record: Malformed) -> None:
        self.malformed += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(str(record))
        if self.malformed == self.records == _HOPELESS:
            raise ValueError(f"{record} (and so are all of the first {_HOPELESS} records)")

    def _hash(self, text: str) -> tuple[str, bytes]:
        """Return the text as it can be tokenized, and its SHA-256."""
        try:
            data = text.encode()
        except UnicodeEncodeError:  # before it is hashed: two texts that become the same tokens are one document
            text = repaired(text)
            data = text.encode()
            self.tokenizer.irregular["repaired"] += 1
        return text, hashlib.sha256(data).digest()


def hashes_path(directory: Path, key: str) -> Path:
    """Return where the table of a part's hashes is."""
    return directory / f"{key}.hashes"


def write_hashes(path: Path, digests: list[bytes]) -> None:
    """Write the table of a part's hashes, sorted by them.

    Args:
        path: The file.
        digests: The first 16 bytes of each document's SHA-256, in the order of the documents.
    """
    numbers = np.frombuffer(b"".join(digests), dtype=[("high", ">u8"), ("low", ">u8")])
    table = np.empty(len(numbers), HASHES)
    table["high"], table["low"], table["place"] = numbers["high"], numbers["low"], np.arange(len(numbers))
    write_file_atomically(path, table[np.argsort(table["high"], kind="stable")].tobytes(), make_folder=False)


def finished_keys(directory: Path) -> set[str]:
    """Return the keys of the parts whose records are in `directory`."""
    return {path.stem for path in directory.glob("*.json") if re.fullmatch("[0-9a-f]{32}", path.stem)}
