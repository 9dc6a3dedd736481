"""Checks that a dataset is what its manifest says, byte by byte.

`problems` lists everything that is wrong. Training calls `check_content`, each rank for its share of the files;
`verified.json` remembers size and status change time (ctime) of files that were found sound, so that the next start
does not read them again. That file is only a cache: without it everything is read, and beside a copy of the files it
vouches for nothing.
"""

import contextlib
import hashlib
import heapq
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from data_pipeline.disk import write_file_atomically
from data_pipeline.foreign import read_json
from data_pipeline.shards.manifest import FILE_NAME, MOST_MANIFEST_BYTES, REMEDY, Manifest, Shard, open_shard
from data_pipeline.shards.megatron import IndexedReader
from data_pipeline.shards.raw import RawReader
from data_pipeline.tokenizer.tokenizer import Tokenizer

STAMP_FILE_NAME = "verified.json"
_CHUNK_BYTES = 1 << 20  # what was hashed is still in the cache when its tokens are looked at
_REPORT_EVERY_SECONDS = 10.0
_TOKEN_SUFFIXES = (".bin", ".idx", ".npy")


def check_content(
    directory: str | Path, manifest: Manifest, *, part: int = 0, parts: int = 1, always: bool = False
) -> None:
    """Compare the files of a dataset with its manifest.

    Content, index, range of the tokens and the end of each document are compared; for part 0 also the tokenizer.

    Args:
        directory: The dataset.
        manifest: Its manifest.
        part: Which of the callers this is, such as a rank of a run. Each reads its share of the shards, balanced by
            tokens; together they read all.
        parts: How many callers there are.
        always: Read files also when size and status change time (ctime) are those that `record_content` noted. No tool
            that copies files carries the latter over; a copy of a whole disk does: after that, ask for this.

    Raises:
        ValueError: One line that names the first file that differs, and the remedy.
    """
    if parts < 1 or not 0 <= part < parts:
        raise ValueError(f"part {part} of {parts}: must be one of 0 to parts - 1")
    if part == 0:
        _first(_tokenizer_problems(directory, manifest))
    known = {} if always else _read_stamp(directory, manifest)
    for shard in _share(manifest, part, parts):
        open_shard(directory, manifest, shard)
        if not _is_known(known, directory, manifest, shard):
            _first(_shard_problems(directory, manifest, shard))


def unread_shards(directory: str | Path, manifest: Manifest, *, always: bool = False) -> list[Shard]:
    """Return the shards that `check_content` would read: all but those for which `record_content` vouches."""
    known = {} if always else _read_stamp(directory, manifest)
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    return [shard for shard in shards if not _is_known(known, directory, manifest, shard)]


def record_content(directory: str | Path, manifest: Manifest) -> None:
    """Note that the files, as they are now, were found sound or have just been written.

    Where the directory cannot be written, nothing is noted and the next check reads everything.
    """
    directory = Path(directory)
    names = [name for shards in manifest.splits.values() for shard in shards for name in manifest.files(shard)]
    with contextlib.suppress(OSError):
        files = {name: _state(directory / name) for name in names}
        stamp = {"content_sha256": manifest.content_sha256, "files": files}
        write_file_atomically(directory / STAMP_FILE_NAME, (json.dumps(stamp, indent=1) + "\n").encode())


def copy_id(directory: str | Path, manifest: Manifest) -> str:
    """Return a text that is the same for all who see the same files, and another one for a copy of them.

    It is a hash of inode numbers and times of the last change of status, which no tool that copies files carries over
    (a copy of a whole disk does), so each machine's own copy has its own.

    Raises:
        OSError: A file is missing.
    """
    names = [name for shards in manifest.splits.values() for shard in shards for name in manifest.files(shard)]
    found = [(Path(directory) / name).stat() for name in names]
    seen = [[manifest.content_sha256], *([status.st_ino, status.st_ctime_ns] for status in found)]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def problems(
    directory: str | Path, manifest: Manifest, *, workers: int = 1, report: Callable[[str], None] = print
) -> Iterator[str]:
    """Yield everything that is wrong, one line each.

    Args:
        directory: The dataset.
        manifest: Its manifest.
        workers: The number of threads that read files (hashing does not hold the GIL).
        report: Gets a line about how far the check is, every ten seconds.
    """
    yield from _tokenizer_problems(directory, manifest)
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    with ThreadPoolExecutor(workers) as pool:
        start = reported = time.monotonic()
        done, total = 0, sum(shard.tokens for shard in shards)
        try:
            found = pool.map(lambda shard: list(_shard_problems(directory, manifest, shard)), shards)
            for shard, of_shard in zip(shards, found):
                yield from of_shard
                done += shard.tokens
                if (now := time.monotonic()) - reported >= _REPORT_EVERY_SECONDS:
                    reported = now
                    report(f"  {done / total:.1%} of {total:,} tokens, {done / (now - start) / 1e6:,.0f} M tokens/s")
        finally:
            pool.shutdown(cancel_futures=True)
    # Beside adopted files there may be others of their owner.
    if not any(source["kind"] == "adopted" for source in manifest.sources):
        listed = {name for shard in shards for name in manifest.files(shard)}
        for path in sorted(Path(directory).iterdir()):
            if path.suffix in _TOKEN_SUFFIXES and path.name not in listed:
                yield f"{path}: not in {FILE_NAME}; move it elsewhere or make the dataset again"


@dataclass(frozen=True)
class Scan:
    """What one pass over a shard's file of tokens found."""

    sha256: str
    min_token: int
    """The smallest id if that is negative, else 0."""
    max_token: int
    documents: int
    """Number of documents, as end-of-text tokens divide a raw file, or as the index says."""
    unended: int | None
    """Position of the last token of the first document that does not end with end-of-text; None if there is none, and
    for a raw file."""


def scan(reader: IndexedReader | RawReader, eot_id: int) -> Scan:
    """Read the whole file of tokens once, in constant memory. The index must have been checked."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK_BYTES)
    smallest, largest, documents, unended, position = 0, 0, 0, None, 0
    last = eot_id
    with open(reader.file.path, "rb", buffering=0) as file:
        digest.update(file.read(reader.file.offset))
        while count := file.readinto(buffer):
            # A system call may return less than asked for; a token must not be cut.
            while count % reader.dtype.itemsize and (more := file.readinto(memoryview(buffer)[count:])):
                count += more
            data = memoryview(buffer)[:count]
            digest.update(data)
            tokens = np.frombuffer(data, reader.dtype, count // reader.dtype.itemsize)
            largest = max(largest, int(tokens.max()))
            if reader.dtype.kind == "i":
                smallest = min(smallest, int(tokens.min()))
            last = int(tokens[-1])
            if isinstance(reader, RawReader):
                documents += int(np.count_nonzero(tokens == eot_id))
            elif unended is None:
                ends = reader.ends_within(position, position + len(tokens))
                wrong = ends[tokens[ends - position] != eot_id]
                unended = int(wrong[0]) if len(wrong) else None
            position += len(tokens)
    if isinstance(reader, RawReader):
        documents += last != eot_id
    else:
        documents = len(reader)
    return Scan(digest.hexdigest(), smallest, largest, documents, unended)


def token_problems(reader: IndexedReader | RawReader, found: Scan, tokenizer: dict) -> Iterator[str]:
    """Yield what is wrong with the tokens of a shard, whatever their hash.

    Args:
        reader: The shard.
        found: What `scan` found in it.
        tokenizer: What the manifest says of the tokenizer.
    """
    path, n_vocab = reader.file.path, tokenizer["n_vocab"]
    if found.min_token < 0 or found.max_token >= n_vocab:
        worst = found.min_token if found.min_token < 0 else found.max_token
        yield (
            f"{path}: token id {worst} is not one of the {n_vocab} ids of tokenizer {tokenizer['name']}; name the "
            f"tokenizer that made these tokens, or make the dataset again"
        )
    if found.unended is not None:
        yield (
            f"{path}: the document that ends at token {found.unended} does not end with the end-of-text id "
            f"{tokenizer['eot_id']}; make the dataset again (in Megatron-LM with --append-eod)"
        )
    if isinstance(reader, IndexedReader) and reader.lengths.min(initial=1) < 1:
        yield f"{reader.index_file}: lists a document without tokens; make the dataset again"


def _shard_problems(directory: str | Path, manifest: Manifest, shard: Shard) -> Iterator[str]:
    try:
        reader = open_shard(directory, manifest, shard)
        if isinstance(reader, IndexedReader):
            try:
                reader.check()
            except ValueError as error:
                raise ValueError(f"{error}; {REMEDY}") from error
            if shard.index_sha256 not in (None, reader.index_sha256()):
                raise ValueError(f"{reader.index_file}: content differs from {FILE_NAME}; {REMEDY}")
        found = scan(reader, manifest.tokenizer["eot_id"])
        if found.sha256 != shard.sha256:
            others = {other.sha256: other.name for others in manifest.splits.values() for other in others}
            other = f", it is that of {others[found.sha256]}" if found.sha256 in others else ""
            raise ValueError(f"{reader.file.path}: content differs from {FILE_NAME}{other}; {REMEDY}")
    except ValueError as error:
        yield str(error)
        return
    except OSError as error:
        yield f"{directory}: shard {shard.name} cannot be read: {error.strerror or error}; {REMEDY}"
        return
    yield from token_problems(reader, found, manifest.tokenizer)
    if found.documents != shard.documents:
        yield (
            f"{reader.file.path}: {found.documents} documents where {FILE_NAME} lists {shard.documents}; make "
            f"the dataset again"
        )
    if shard.max_token is not None and found.max_token != shard.max_token:
        yield (
            f"{reader.file.path}: the largest id is {found.max_token} where {FILE_NAME} lists {shard.max_token}; make "
            f"the dataset again"
        )


def _tokenizer_problems(directory: str | Path, manifest: Manifest) -> Iterator[str]:
    try:
        tokenizer = Tokenizer.load(directory)
    except ValueError as error:
        yield f"{error}; {REMEDY}"
        return
    for key, found in tokenizer.description().items():
        if found != (listed := manifest.tokenizer[key]):
            yield (
                f"{directory}/tokenizer.gptoss.json: not the tokenizer of {FILE_NAME}, its {key} is {found!r}, "
                f"not {listed!r}; {REMEDY}"
            )
            return


def _first(found: Iterator[str]) -> None:
    for problem in found:
        raise ValueError(problem)


def _share(manifest: Manifest, part: int, parts: int) -> list[Shard]:
    """Return the shards that one of the callers reads; the largest are dealt first, to whoever has the least.

    All shards are dealt, not only those without a stamp: ranks that see different stamps must still read every shard
    together.
    """
    loads = [(0, i) for i in range(parts)]
    mine = []
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    for shard in sorted(shards, key=lambda shard: (-shard.tokens, shard.name)):
        load, owner = heapq.heappop(loads)
        heapq.heappush(loads, (load + shard.tokens, owner))
        if owner == part:
            mine.append(shard)
    return mine


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_ctime_ns]


def _is_known(known: dict[str, list[int]], directory: str | Path, manifest: Manifest, shard: Shard) -> bool:
    paths = [Path(directory) / name for name in manifest.files(shard)]
    return all(path.name in known and path.exists() and known[path.name] == _state(path) for path in paths)


def _read_stamp(directory: str | Path, manifest: Manifest) -> dict[str, list[int]]:
    try:
        stamp = read_json(Path(directory) / STAMP_FILE_NAME, _Stamp, most=MOST_MANIFEST_BYTES)
    except ValueError:
        return {}
    return stamp.files if stamp.content_sha256 == manifest.content_sha256 else {}


class _Stamp(msgspec.Struct):
    """What `record_content` writes."""

    content_sha256: str
    files: dict[str, list[int]]
