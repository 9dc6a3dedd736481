"""Stores as fsspec's file systems, and what they say of a file."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.stores.attempts import READING, Patience, changed_text, repeat
from data_pipeline.stores.errors import ChangedError, StoreError

# What changes with the content, the surest first. Times are last: a listing may have them more exactly than the file.
_VERSIONS = ("ETag", "etag", "blob_id", "Content-MD5", "Digest", "mtime", "LastModified", "Last-Modified", "updated")
# A secret key may hold slashes. The name of an access point, which is allowed, begins with `arn:`.
_KEYS_IN_BUCKET = re.compile(r"(?:^|::)(?:s3a?|gc?s)://(?:[^/]*@|(?!arn:)[^/:@]*:[^@]*@)")
_CONNECT_SECONDS, _READ_SECONDS = 10, 30


@dataclass(frozen=True)
class FileState:
    """What a store says of a file."""

    size: int | None
    """Bytes; None when not known."""
    version: str
    """A text that changes when the content does; empty when not known."""

    def differs(self, other: "FileState") -> bool:
        """Return whether the two are known to be different."""
        sizes, versions = (self.size, other.size), (self.version, other.version)
        return (None not in sizes and sizes[0] != sizes[1]) or (all(versions) and versions[0] != versions[1])


def state_of(info: Mapping[str, Any]) -> FileState:
    """Return the state that one of fsspec's descriptions of a file has."""
    return FileState(info.get("size"), next((str(info[key]) for key in _VERSIONS if info.get(key)), ""))


def open_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it.

    Waits have limits, and boto repeats a request only twice, unless fsspec's or boto's configuration says otherwise.

    Raises:
        StoreError: The URL holds keys where a bucket's name belongs.
        ImportError: The package for the store is not installed.
    """
    import fsspec

    if _KEYS_IN_BUCKET.search(url):
        raise StoreError(
            "a URL of a bucket cannot hold keys; leave them out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "(or what else the store takes) in the environment"
        )
    protocols = re.findall(r"(?:^|::)([a-z0-9]+)://", url)
    options = {protocol: found for protocol in protocols if (found := _options(protocol))}
    system, path = fsspec.core.url_to_fs(url, **options)
    if "s3" in system.protocol:
        system.retries = 1  # s3fs would ask for the same range five times, and a smaller one may come through
    return system, path


def _options(protocol: str) -> dict[str, dict]:
    import fsspec

    name, own = "", dict[str, Any]()
    if protocol in ("s3", "s3a") and "AWS_MAX_ATTEMPTS" not in os.environ:
        # Of one request, as a listing has for every 1,000 names. Five of these after each other, boto's default, take
        # half a minute where a store is down.
        name, own = "config_kwargs", {"retries": {"total_max_attempts": 3, "mode": "standard"}}
    elif protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        name, own = "client_kwargs", {"timeout": timeout}
    configured = fsspec.config.conf.get(protocol, {}).get(name, {})
    return {name: {**own, **configured}} if own and isinstance(configured, dict) else {}


def current_state(system, path: str) -> FileState:
    """Return the state of a file as it is now, not as an earlier listing had it."""
    system.invalidate_cache()
    return state_of(system.info(path))


def check_unchanged(url: str, before: FileState, patience: Patience = READING) -> None:
    """Check that a file is what it was.

    Args:
        url: The file.
        before: Its state when it was found.
        patience: How long to wait for a store that does not answer.

    Raises:
        ChangedError: It is another one.
        StoreError: The store cannot be asked, or the file is gone.
    """
    system, path = open_system(url)
    if repeat(url, lambda: current_state(system, path), patience).differs(before):
        raise ChangedError(changed_text())
