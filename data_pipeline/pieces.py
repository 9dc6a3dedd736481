"""One part of a source as finished shards: read, filtered, tokenized and written by one process.

A piece is a set of files that appear one after the other, each whole, synced and by renaming; its record, KEY.json,
comes last and says that it is complete. KEY is a hash of everything that its bytes depend on, so that a run that was
killed, or one with other sources, takes over what fits.
"""

import contextlib
import hashlib
import importlib
import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_pipeline.files import first_line
from data_pipeline.indexed import data_path, index_path, token_dtype
from data_pipeline.manifest import SPLITS, Shard
from data_pipeline.records import Malformed
from data_pipeline.shards import SplitWriter
from data_pipeline.sources import Part
from data_pipeline.tokenizer import Tokenizer, repaired
from data_pipeline.vocabulary import write_file_atomically

VERSION = 2
# Of each document: the first 16 bytes of its SHA-256 as two numbers, and its place among the documents of the piece.
HASHES = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u4")])
MAX_EXAMPLES = 1000
_HOPELESS = 100  # records, all malformed: a wrong column, not bad luck
_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class Rules:
    """What becomes of a text.

    normalization: a Unicode form (NFC, NFD, NFKC, NFKD) or None. min_characters, max_characters: shorter and longer
    documents are dropped. filters: MODULE:FUNCTION each, called with the text; True keeps it, False drops it, a string
    replaces it. deduplicate: drop exact copies of earlier documents. validation_fraction: share of the documents held
    out, decided by their hash. shard_tokens: most tokens of a shard. max_documents: stop after so many.

    Raises ValueError for impossible values and for filters that cannot be imported.
    """

    normalization: str | None = None
    min_characters: int = 0
    max_characters: int | None = None
    filters: tuple[str, ...] = ()
    deduplicate: bool = True
    validation_fraction: float = 0.01
    shard_tokens: int = 1 << 26
    max_documents: int | None = None

    def __post_init__(self):
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction {self.validation_fraction}: must be at least 0 and less than 1")
        for name, least in (("shard_tokens", 1), ("max_documents", 1), ("min_characters", 0), ("max_characters", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} {value}: must be at least {least}")
        if self.max_characters is not None and self.min_characters > self.max_characters:
            raise ValueError(
                f"min_characters {self.min_characters}: must not be more than max_characters, which is "
                f"{self.max_characters}"
            )
        if self.normalization not in (None, "NFC", "NFD", "NFKC", "NFKD"):
            raise ValueError(f"normalization {self.normalization!r}: must be NFC, NFD, NFKC or NFKD")
        # Once, together with loading them: a file that is edited meanwhile is another filter.
        object.__setattr__(self, "filter_versions", {name: _filter_version(name) for name in self.filters})

    def fingerprint(self) -> dict:
        """Everything about the rules that decides on the bytes, as JSON values. Of filters: the file of their module,
        and its `VERSION`, which should change with whatever else they use.
        """
        return asdict(self) | {"filters": [[name, *self.filter_versions[name]] for name in self.filters]}

    def check_filters(self) -> None:
        """Raises ValueError when a filter is not the one that the rules were made with."""
        for name, version in self.filter_versions.items():
            if _filter_version(name) != version:
                raise ValueError(f"filter {name}: was changed while the texts were being prepared; start again")


def load_filter(name: str) -> Callable[[str], bool | str]:
    """The function of MODULE:FUNCTION. Raises ValueError when there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module's own code raises
        raise ValueError(
            f"filter {name!r}: expected MODULE:FUNCTION that can be imported ({first_line(error)})"
        ) from error
    if not callable(found):
        raise ValueError(f"filter {name!r}: {function} is not a function")
    return found


def _filter_version(name: str) -> list:
    load_filter(name)
    module = sys.modules[name.partition(":")[0]]
    file = getattr(module, "__file__", None)
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else None
    return [digest, repr(getattr(module, "VERSION", None))]


def in_validation(high: np.ndarray, fraction: float) -> np.ndarray:
    """Whether documents are held out, by the first 8 bytes of their SHA-256, as numbers in [0, 2^64)."""
    return high.astype(np.float64) / 2.0**64 < fraction


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
        text, reason = _filtered(record, rules, filters)
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


def _filtered(text: str, rules: Rules, filters: list) -> tuple[str, str | None]:
    """The text as it will be tokenized, and why it is dropped, if it is."""
    if rules.normalization:
        text = unicodedata.normalize(rules.normalization, text)
    for name, function in filters:
        try:
            answer = function(text)
        except Exception as error:
            raise ValueError(f"filter {name}: {first_line(error)}, on a text that begins {text[:40]!r}") from error
        if isinstance(answer, str):
            text = answer
        elif not isinstance(answer, (bool, np.bool_)):
            raise ValueError(
                f"filter {name}: returned {answer!r:.40}, on a text that begins {text[:40]!r}; expected True "
                f"to keep it, False to drop it, or a text in its place"
            )
        elif not answer:
            return text, name
    if not text:
        return text, "empty"
    if len(text) < rules.min_characters:
        return text, "short"
    if rules.max_characters is not None and len(text) > rules.max_characters:
        return text, "long"
    return text, None


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
