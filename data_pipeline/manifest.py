"""manifest.json: what a prepared dataset holds. A directory with a valid manifest is complete, because it is renamed
into place whole.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.indexed import IndexedReader

FILE_NAME = "manifest.json"
FORMAT = "gptoss_dist tokens"
VERSION = 1
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Shard:
    """NAME.bin and NAME.idx; in a raw dataset the one file NAME.

    sha256: of the file of tokens. index_sha256: of the .idx file, if known. max_token: the largest id, if known.
    source: what it was made of.
    """

    name: str
    tokens: int
    documents: int
    sha256: str
    index_sha256: str | None = None
    max_token: int | None = None
    source: str | None = None


@dataclass(frozen=True)
class Manifest:
    """What `prepare` wrote.

    tokenizer: name, sha256, n_vocab and eot_id. splits: shards by split name, in order. dropped: documents left out, by
    reason. irregular: documents that the tokenizer had to treat, by reason (see `Tokenizer`). storage: "megatron" for
    .bin and .idx, "raw" for files of token ids alone.
    """

    tokenizer: dict
    dtype: str
    splits: dict[str, list[Shard]]
    sources: list[dict]
    dropped: dict[str, int]
    irregular: dict[str, int]
    python_version: str
    storage: str = "megatron"

    @property
    def content_sha256(self) -> str:
        """Of the tokens and what they mean: equal for equal text, tokenizer and shard size, on any machine."""
        shards = {split: [shard.sha256 for shard in shards] for split, shards in self.splits.items()}
        content = [self.tokenizer["sha256"], self.tokenizer["eot_id"], self.dtype, shards]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.splits[split])

    def documents(self, split: str) -> int:
        return sum(shard.documents for shard in self.splits[split])

    def to_json(self) -> bytes:
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
        """Raises ValueError, naming the file, when it is missing, truncated, altered or of another version."""
        path = Path(directory) / FILE_NAME
        try:
            fields = json.loads(path.read_bytes())
        except OSError as error:
            raise ValueError(
                f"{directory}: not a prepared dataset, {FILE_NAME} cannot be read ({error.strerror}); make one with "
                f"`python -m data_pipeline.prepare pystdlib --output {directory}`"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}: truncated or damaged: {error}; prepare the dataset again") from error
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
            if any(Path(shard.name).name != shard.name for shards in splits.values() for shard in shards):
                raise ValueError("a shard lies outside the directory")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else error
            raise ValueError(f"{path}: damaged manifest: {reason}; prepare the dataset again") from error
        return manifest


def open_shards(directory: str | Path, manifest: Manifest, split: str) -> list[IndexedReader]:
    """Memory maps of every shard of a split. Raises ValueError, naming the file, when one is missing, truncated or not
    the one listed.
    """
    readers = []
    for shard in manifest.splits[split]:
        prefix = Path(directory) / shard.name
        reader = IndexedReader(prefix)
        found = (reader.dtype.name, reader.n_tokens, len(reader))
        listed = (manifest.dtype, shard.tokens, shard.documents)
        if found != listed:
            raise ValueError(
                f"{prefix}.idx: holds {found[0]}, {found[1]} tokens, {found[2]} documents where {FILE_NAME} lists "
                f"{listed[0]}, {listed[1]}, {listed[2]}; prepare the dataset again"
            )
        readers.append(reader)
    return readers
