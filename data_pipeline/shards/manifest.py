"""manifest.json: what a prepared dataset holds.

A directory with a valid manifest is complete, because it is renamed into place whole.
"""

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.shards.megatron import DTYPE_CODES, IndexedReader
from data_pipeline.shards.raw import DTYPES, RawReader

FILE_NAME = "manifest.json"
FORMAT = "gptoss_dist tokens"
VERSION = 1
SPLITS = ("train", "validation")
STORAGES = {"megatron": [dtype.name for dtype in DTYPE_CODES.values()], "raw": list(DTYPES)}  # dtypes of each
_SOURCE_KEYS = ("source", "kind")
REMEDY = "restore it from a good copy or make the dataset again"


@dataclass(frozen=True)
class Shard:
    """The files NAME.bin and NAME.idx; in a raw dataset the one file NAME."""

    name: str
    tokens: int
    documents: int
    sha256: str
    """Hash of the file of tokens."""
    index_sha256: str | None = None
    """Hash of the .idx file, if known."""
    max_token: int | None = None
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
            fields = json.loads(path.read_bytes())
        except OSError as error:
            if isinstance(error, FileNotFoundError) and (inside := _datasets_in(Path(directory))):
                others = f", and {len(inside) - 1} more there" if len(inside) > 1 else ""
                raise ValueError(
                    f"{directory}: not a prepared dataset itself, but {inside[0]} is one{others}"
                ) from error
            raise ValueError(
                f"{directory}: not a prepared dataset, {FILE_NAME} cannot be read ({error.strerror}); make one with "
                f"`python -m data_pipeline.prepare pystdlib --output {directory}`, or write one for token files that "
                f"are there with `python -m data_pipeline.adopt {directory}`"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}: truncated or damaged: {error}; {REMEDY}") from error
        try:
            if fields["format"] != FORMAT or fields["version"] != VERSION:
                raise ValueError(
                    f"format {fields['format']!r} version {fields['version']!r} is not {FORMAT!r} version {VERSION}"
                )
            splits = {split: [Shard(**shard) for shard in value["shards"]] for split, value in fields["splits"].items()}
            manifest = cls(
                splits=splits,
                **{key: fields[key] for key in cls.__annotations__ if key not in ("splits", "storage")},
                storage=fields.get("storage", "megatron"),
            )
            totals = {split: (value["tokens"], value["documents"]) for split, value in fields["splits"].items()}
            if totals != {split: (manifest.tokens(split), manifest.documents(split)) for split in splits}:
                raise ValueError("the totals of a split are not the sums over its shards")
            if manifest.content_sha256 != fields["content_sha256"]:
                raise ValueError("content_sha256 does not match the shards it lists")
            if set(splits) != set(SPLITS):
                raise ValueError(f"its splits are not {' and '.join(SPLITS)}")
            names = [shard.name for shards in splits.values() for shard in shards]
            if any(Path(name).name != name for name in names):
                raise ValueError("a shard lies outside the directory")
            if len(set(names)) < len(names):
                raise ValueError("a shard is listed twice")
            for value in (
                manifest.tokenizer["name"],
                *(source[key] for source in manifest.sources for key in _SOURCE_KEYS),
            ):
                if not isinstance(value, str):
                    raise ValueError(f"{value!r} is not a name")
            for count in (*manifest.dropped.values(), *manifest.irregular.values()):
                if not isinstance(count, int):
                    raise ValueError(f"{count!r} is not a number of documents")
            if manifest.dtype not in STORAGES[manifest.storage]:
                raise ValueError(f"dtype {manifest.dtype!r} is none that storage {manifest.storage!r} has")
            if not 0 <= manifest.tokenizer["eot_id"] < manifest.tokenizer["n_vocab"]:
                raise ValueError("the end-of-text token is not in the vocabulary")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else error
            raise ValueError(f"{path}: damaged manifest: {reason}; {REMEDY}") from error
        return manifest


def _datasets_in(directory: Path) -> list[Path]:
    found = []
    for path in sorted(directory.glob(f"[!.]*/{FILE_NAME}")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            if json.loads(path.read_bytes())["format"] == FORMAT:
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
