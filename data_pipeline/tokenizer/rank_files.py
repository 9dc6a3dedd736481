"""Byte-pair rank files: the tiktoken text format, and where OpenAI's published ones are found without tiktoken.

    python -m data_pipeline.vocabulary o200k_base               # look everywhere, then download; store in our cache
    python -m data_pipeline.vocabulary o200k_base --from FILE   # take it from a rank file, wheel, zip or npm tarball

Every published file is pinned by its SHA-256, so any place that has the bytes will do.
"""

import base64
import binascii
import gzip
import hashlib
import importlib.util
import logging
import os
import tarfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.command_line import MISTAKE, Program, option, positional, run
from data_pipeline.disk import write_file_atomically

logger = logging.getLogger(__name__)

SHA256 = {
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    "r50k_base": "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
}
MOST_ID = 2**31 - 1
"""The largest id of a token."""
MOST_RANK_BYTES = 256 << 20
"""The largest rank file that is read."""
_SOCKET_TIMEOUT_SECONDS = 20
_DOWNLOAD_LIMIT_SECONDS = 300


def parse_ranks(data: bytes, origin: str) -> dict[bytes, int]:
    """Return the ranks of a tiktoken rank file by token bytes.

    Args:
        data: The content of the file, lines of `base64 rank`.
        origin: What messages call the file.

    Raises:
        ValueError: It is not such a file; the message names `origin`, and the line that is wrong.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{origin}, line {number}: not a tiktoken rank file (lines are `base64 rank`)") from error
    if len(set(ranks.values())) != len(ranks) or any(not 0 <= rank <= MOST_ID for rank in ranks.values()):
        raise ValueError(f"{origin}: ranks must be distinct, not negative and below 2^31")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError(f"{origin}: a byte-level vocabulary needs a rank for each of the 256 single bytes")
    return ranks


def format_ranks(ranks: dict[bytes, int]) -> bytes:
    """Return the content of a tiktoken rank file, in order of rank; the inverse of `parse_ranks`."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


def cache_directory() -> Path:
    """Return $XDG_CACHE_HOME/gptoss_dist, or ~/.cache/gptoss_dist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptoss_dist"


def find_ranks(name: str, *, vocab_file: str | Path | None = None, download: bool = True) -> bytes:
    """Return the bytes of a published rank file.

    It is looked for in `vocab_file`, our cache, installed packages and tiktoken's cache, and then downloaded.

    Args:
        name: The published vocabulary.
        vocab_file: Where it is, instead of searching.
        download: Whether it may be downloaded. On a cluster let one rank look first; the others then find our cache.

    Raises:
        ValueError: It is nowhere; the message says what to put where.
    """
    if vocab_file is not None:
        return read_matching(Path(vocab_file), name)
    looked: list[str] = []
    for path in _candidates(name):
        if not path.is_file():
            looked.append(str(path))
            continue
        try:
            data = read_matching(path, name)
        except ValueError:
            logger.warning("%s has not the SHA-256 of %s; ignored", path, name)
            looked.append(f"{path} (wrong content)")
        else:
            logger.info("vocabulary %s from %s", name, path)
            return data
    reason = "downloading is turned off"
    if download:
        try:
            return _download(name)
        except (OSError, ValueError) as error:
            reason = f"{_url(name)} cannot be downloaded ({error})"
    install = "" if name == "r50k_base" else "`pip install bpe-openai`; or "  # which does not have that one
    raise ValueError(
        f"The vocabulary {name} is not on this machine and {reason}. Either {install}copy {name}.tiktoken to "
        f"{_cache_path(name)}; or run `python -m data_pipeline.vocabulary {name} --from FILE` with that file or with a "
        f"wheel or npm tarball that contains it (litellm, llama-index-core, gpt-tokenizer); or use --tokenizer "
        f"builtin, whose ids are different. Looked in: {'; '.join(looked)}"
    )


def read_matching(path: Path, name: str) -> bytes:
    """Return the published rank file `name` from a plain or gzipped file, or from a member of an archive.

    Raises:
        ValueError: The file cannot be read, or it neither is nor contains that vocabulary.
    """
    try:
        for data in _contents(path, name):
            if hashlib.sha256(data).hexdigest() == SHA256[name]:
                return data
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    raise ValueError(f"{path}: is not, and does not contain, the vocabulary {name} (SHA-256 {SHA256[name]})")


def _url(name: str) -> str:
    return f"https://openaipublic.blob.core.windows.net/encodings/{name}.tiktoken"


def _tiktoken_cache_name(name: str) -> str:
    return hashlib.sha1(_url(name).encode()).hexdigest()


def _cache_path(name: str) -> Path:
    return cache_directory() / f"{name}.tiktoken"


def _candidates(name: str) -> Iterator[Path]:
    yield _cache_path(name)
    for package, relative in (
        ("bpe_openai", f"data/{name}.tiktoken.gz"),
        ("litellm", f"litellm_core_utils/tokenizers/{_tiktoken_cache_name(name)}"),
        ("llama_index", f"core/_static/tiktoken_cache/{_tiktoken_cache_name(name)}"),
    ):
        spec = importlib.util.find_spec(package)  # finds the folder without importing the package
        for root in (spec.submodule_search_locations or []) if spec else []:
            yield Path(root) / relative
    if directory := os.environ.get("TIKTOKEN_CACHE_DIR"):
        yield Path(directory) / _tiktoken_cache_name(name)


def _contents(path: Path, name: str) -> Iterator[bytes]:
    """Yield the content of the file, or of an archive's members that are called like the vocabulary, unzipped."""
    names = {f"{name}.tiktoken", f"{name}.tiktoken.gz", _tiktoken_cache_name(name)}
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if Path(member).name in names:
                    yield _unzipped(archive.read(member))
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:
            for entry in tar:
                if Path(entry.name).name in names and (file := tar.extractfile(entry)) is not None:
                    yield _unzipped(file.read())
    else:
        yield _unzipped(path.read_bytes())


def _unzipped(data: bytes) -> bytes:
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def _download(name: str) -> bytes:
    deadline = time.monotonic() + _DOWNLOAD_LIMIT_SECONDS
    data = bytearray()
    with urllib.request.urlopen(_url(name), timeout=_SOCKET_TIMEOUT_SECONDS) as response:
        while chunk := response.read(1 << 16):
            data += chunk
            if time.monotonic() > deadline:
                raise TimeoutError(f"not complete after {_DOWNLOAD_LIMIT_SECONDS} s")
    if hashlib.sha256(data).hexdigest() != SHA256[name]:
        raise ValueError("what was received has another SHA-256")
    _store(name, bytes(data))
    return bytes(data)


def _store(name: str, data: bytes) -> None:
    path = _cache_path(name)
    try:
        write_file_atomically(path, data)
    except OSError as error:
        logger.warning("the vocabulary %s could not be kept in %s: %s", name, path, error)


@dataclass
class VocabularyOptions:
    """Store a published vocabulary."""

    name: Literal["cl100k_base", "o200k_base", "r50k_base"] = positional("NAME")
    """Its name."""
    vocab_file: str | None = option(None, spelling="--from")
    """Rank file, or wheel, zip or npm tarball that contains it; null searches, then downloads."""


def main(argv: list[str] | None = None) -> int:
    """Store the vocabulary that the command line names; return the exit code."""
    return run(Program("python -m data_pipeline.vocabulary", failed=MISTAKE), VocabularyOptions, _store_found, argv)


def _store_found(options: VocabularyOptions) -> None:
    path = _cache_path(options.name)
    write_file_atomically(path, find_ranks(options.name, vocab_file=options.vocab_file))
    print(f"{options.name}: {path}")
