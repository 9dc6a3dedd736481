"""manifest.json: what a prepared dataset holds.

A directory with a valid manifest is complete, because it is renamed into place whole.
"""

import contextlib
import difflib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from data_pipeline.foreign import Count, convert, parse_json, read_json, read_text
from data_pipeline.printable import printable
from data_pipeline.shards.megatron import DTYPE_CODES, IndexedReader
from data_pipeline.shards.raw import DTYPES, RawReader
from data_pipeline.shards.recipes import find_recipe

FILE_NAME = "manifest.json"
FORMAT = "gptoss_dist tokens"
VERSION = 1
SPLITS = ("train", "validation")
STORAGES = {"megatron": [dtype.name for dtype in DTYPE_CODES.values()], "raw": list(DTYPES)}  # dtypes of each
MOST_MANIFEST_BYTES = 256 << 20
"""The largest manifest that is read: one of 10^6 shards is smaller."""
_TOKEN_SUFFIXES = (".bin", ".idx", ".npy", ".arrow")
REMEDY = "restore it from a good copy or make the dataset again"


@dataclass(frozen=True)
class Shard:
    """The files NAME.bin and NAME.idx; in a raw dataset the one file NAME."""

    name: str
    tokens: Count
    documents: Count
    sha256: str
    """Hash of the file of tokens."""
    index_sha256: str | None = None
    """Hash of the .idx file, if known."""
    max_token: Count | None = None
    """The largest id, if known."""
    source: str | None = None
    """What the shard was made of, if known."""


@dataclass(frozen=True)
class Manifest:
    """What `prepare` wrote, or what `adopt` found."""

    tokenizer: dict
    """The tokenizer's name, sha256, n_vocab and eot_id."""
    dtype: str
    splits: dict[str, list[Shard]]
    """Shards by the split's name, in order."""
    sources: list[dict]
    dropped: dict[str, int]
    """Numbers of documents that were left out, by reason."""
    irregular: dict[str, int]
    """Numbers of documents that the tokenizer had to treat, by reason (see `Tokenizer`)."""
    python_version: str
    storage: str = "megatron"
    """`megatron` for .bin and .idx, `raw` for files of token ids alone."""

    @property
    def content_sha256(self) -> str:
        """Hash of the tokens and what they mean: equal for equal text, tokenizer and shard size, on any machine."""
        shards = {split: [shard.sha256 for shard in shards] for split, shards in self.splits.items()}
        content = [self.tokenizer["sha256"], self.tokenizer["eot_id"], self.dtype, shards]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def tokens(self, split: str) -> int:
        """Return the number of tokens of a split."""
        return sum(shard.tokens for shard in self.splits[split])

    def documents(self, split: str) -> int:
        """Return the number of documents of a split."""
        return sum(shard.documents for shard in self.splits[split])

    def files(self, shard: Shard) -> list[str]:
        """Return the names of a shard's files: of the one with the tokens, then of the index if there is one."""
        return [shard.name] if self.storage == "raw" else [f"{shard.name}.bin", f"{shard.name}.idx"]

    def to_json(self) -> bytes:
        """Return the content of manifest.json."""
        splits = {
            split: {
                "tokens": self.tokens(split),
                "documents": self.documents(split),
                "shards": [asdict(shard) for shard in shards],
            }
            for split, shards in self.splits.items()
        }
        fields = vars(self) | {"splits": splits}
        fields = {"format": FORMAT, "version": VERSION, **fields, "content_sha256": self.content_sha256}
        return (json.dumps(fields, indent=1) + "\n").encode()

    @classmethod
    def read(cls, directory: str | Path) -> "Manifest":
        """Read a manifest, or raise ValueError that names the file if it is missing, damaged or of another version."""
        path = Path(directory) / FILE_NAME
        try:
            values = parse_json(read_text(path, most=MOST_MANIFEST_BYTES), path)
        except ValueError as error:
            if isinstance(error.__cause__, OSError):
                raise _not_a_dataset(Path(directory), error.__cause__) from error
            raise ValueError(f"{path}: truncated or damaged: {error}; {REMEDY}") from error
        origin = f"{path}: damaged manifest"
        named = convert(values, _Named, origin, remedy=REMEDY)
        if (named.format, named.version) != (FORMAT, VERSION):
            found = f"format {named.format!r} version {named.version!r}"
            raise ValueError(f"{origin}: {found} is not {FORMAT!r} version {VERSION}; {REMEDY}")
        fields = convert(values, _Fields, origin, remedy=REMEDY)
        manifest = cls(
            tokenizer=values["tokenizer"],
            dtype=fields.dtype,
            splits={split: found.shards for split, found in fields.splits.items()},
            sources=values["sources"],
            dropped=fields.dropped,
            irregular=fields.irregular,
            python_version=fields.python_version,
            storage=fields.storage,
        )
        for problem in manifest._contradictions(fields):
            raise ValueError(f"{origin}: {printable(problem)}; {REMEDY}")
        return manifest

    def _contradictions(self, fields: "_Fields") -> Iterator[str]:
        """Yield what cannot be in a manifest that was read as `fields`."""
        totals = {split: (found.tokens, found.documents) for split, found in fields.splits.items()}
        if totals != {split: (self.tokens(split), self.documents(split)) for split in self.splits}:
            yield "the totals of a split are not the sums over its shards"
        if self.content_sha256 != fields.content_sha256:
            yield "content_sha256 does not match the shards it lists"
        if self.splits.keys() != set(SPLITS):
            yield f"its splits are not {' and '.join(SPLITS)}"
        names = [shard.name for shards in self.splits.values() for shard in shards]
        if any(Path(name).name != name or name == ".." or "\0" in name for name in names):
            yield "a shard lies outside the directory"
        if len(set(names)) < len(names):
            yield "a shard is listed twice"
        if self.dtype not in STORAGES.get(self.storage, ()):
            yield f"dtype {self.dtype!r} is none that storage {self.storage!r} has"
        if fields.tokenizer.eot_id >= fields.tokenizer.n_vocab:
            yield "the end-of-text token is not in the vocabulary"


class _Named(msgspec.Struct):
    format: str
    version: int


class _Tokenizer(msgspec.Struct):
    name: str
    sha256: str
    n_vocab: Count
    eot_id: Count


class _Source(msgspec.Struct):
    """What every source says; each kind of source adds to it."""

    source: str
    kind: str


class _Split(msgspec.Struct):
    tokens: Count
    documents: Count
    shards: list[Shard]


class _Fields(msgspec.Struct):
    """The content of manifest.json."""

    tokenizer: _Tokenizer
    dtype: str
    splits: dict[str, _Split]
    sources: list[_Source]
    dropped: dict[str, int]
    irregular: dict[str, int]
    python_version: str
    content_sha256: str
    storage: str = "megatron"


def _not_a_dataset(directory: Path, error: OSError) -> ValueError:
    """Return the message for a folder whose manifest cannot be read."""
    if isinstance(error, FileNotFoundError) and (inside := _datasets_in(directory)):
        others = f", and {len(inside) - 1} more there" if len(inside) > 1 else ""
        return ValueError(f"{directory}: not a prepared dataset itself, but {inside[0]} is one{others}")
    here = printable(directory)
    source = "pystdlib" if directory.name == "pystdlib" else "SOURCES"
    recipe = find_recipe(directory)
    arguments = f"{source} --output {here}" if recipe is None else f"--config {printable(recipe)}"
    prepare = f"make one with `python -m data_pipeline.prepare {arguments}`"
    if not directory.exists():
        if recipe is not None:
            return ValueError(f"{here}: not a prepared dataset, there is no such directory; {prepare}")
        beside = {path.name: path for path in _datasets_in(directory.parent)}
        close = difflib.get_close_matches(directory.name, beside, n=1)
        meant = f"; did you mean {printable(beside[close[0]])}?" if close else ""
        return ValueError(f"{here}: not a prepared dataset, there is no such directory{meant}; {prepare}")
    if not directory.is_dir():
        of_file = f"make one of it with `python -m data_pipeline.prepare {here} --output DIR`"
        return ValueError(f"{here}: not a prepared dataset, it is a file; {of_file}")
    if any(path.suffix in _TOKEN_SUFFIXES for path in directory.iterdir()):
        prepare += f", or write one for the token files that are there with `python -m data_pipeline.adopt {here}`"
    return ValueError(f"{here}: not a prepared dataset, {FILE_NAME} cannot be read ({error.strerror}); {prepare}")


def _datasets_in(directory: Path) -> list[Path]:
    found = []
    for path in sorted(directory.glob(f"[!.]*/{FILE_NAME}")):
        with contextlib.suppress(ValueError):
            if read_json(path, _Named, most=MOST_MANIFEST_BYTES).format == FORMAT:
                found.append(path.parent)
    return found


def open_shards(directory: str | Path, manifest: Manifest, split: str) -> list[IndexedReader | RawReader]:
    """Return the readers of every shard of a split.

    Raises:
        ValueError: As `open_shard`.
    """
    return [open_shard(directory, manifest, shard) for shard in manifest.splits[split]]


def open_shard(directory: str | Path, manifest: Manifest, shard: Shard) -> IndexedReader | RawReader:
    """Return a shard's reader, by the manifest's storage; only sizes and headers are looked at.

    Raises:
        ValueError: A file is missing, truncated or not the one listed, or the manifest itself lists an id beyond the
            vocabulary. The message names the file.
    """
    path = Path(directory) / shard.name
    n_vocab, eot_id = manifest.tokenizer["n_vocab"], manifest.tokenizer["eot_id"]
    try:
        if manifest.storage == "raw":
            reader: IndexedReader | RawReader = RawReader(path, manifest.dtype, eot_id=eot_id, n_vocab=n_vocab)
            documents = shard.documents  # counting them would read everything
        else:
            reader = indexed = IndexedReader(path)
            path, documents = indexed.index_file, len(indexed)
        found = (reader.dtype.name, reader.n_tokens, documents)
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from error
    listed = (manifest.dtype, shard.tokens, shard.documents)
    if found != listed:
        raise ValueError(
            f"{path}: holds {found[0]}, {found[1]} tokens, {found[2]} documents where {FILE_NAME} lists "
            f"{listed[0]}, {listed[1]}, {listed[2]}; {REMEDY}"
        )
    if shard.max_token is not None and shard.max_token >= n_vocab:
        raise ValueError(
            f"{reader.file.path}: holds token id {shard.max_token}, beyond the vocabulary of {n_vocab} ids of "
            f"tokenizer {manifest.tokenizer['name']}; make the dataset again with the tokenizer that fits"
        )
    return reader
