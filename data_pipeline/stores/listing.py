"""What is in a folder of a store, or matches a pattern; unlike fsspec's own search, an error is no empty folder.

fsspec's `glob`, and `find` where a store has none of its own, leave out a folder that cannot be listed at the moment,
and half a corpus that is missing without a word is found out by nobody.
"""

import fnmatch
import glob
import re
from typing import Any

_LISTS_AT_ONCE = {"s3", "s3a", "gs", "gcs", "hf"}
"""Stores whose `find` asks for all that begins with a path, and passes errors on."""

Infos = dict[str, dict[str, Any]]
"""fsspec's descriptions of files, by name."""


def files_below(system: Any, folder: str) -> Infos:
    """Return the files in a folder and those below it.

    Raises:
        Exception: The folder, or one below it, cannot be listed; each store raises its own kinds.
    """
    protocols = (system.protocol,) if isinstance(system.protocol, str) else system.protocol
    if _LISTS_AT_ONCE.intersection(protocols):
        return {name: info for name, info in system.find(folder, detail=True).items() if info["type"] != "directory"}
    return _walk(system, folder, ["**"], set())


def files_matching(system: Any, pattern: str) -> Infos:
    """Return the files that match a pattern, in which `**` stands for any number of folders.

    Raises:
        Exception: A folder on the way cannot be listed; each store raises its own kinds.
    """
    from fsspec.utils import glob_translate

    segments = pattern.split("/")
    literal = next(index for index, segment in enumerate(segments) if glob.has_magic(segment))
    found = _walk(system, "/".join(segments[:literal]), segments[literal:], set())
    matches = re.compile(glob_translate(pattern)).match
    return {name: info for name, info in found.items() if matches(name)}


def _walk(system: Any, folder: str, segments: list[str], visited: set[str]) -> Infos:
    """Return files below a folder: at least those that match the segments of a pattern, one for each level."""
    visited.add(folder)
    is_last, deep = len(segments) == 1, segments[0] == "**"
    found: Infos = {}
    for info in system.ls(folder, detail=True):
        name = info["name"].rstrip("/")
        if name == folder.rstrip("/") or name in visited:  # a folder may be an object too
            continue
        if info["type"] != "directory":
            found[name] = info
        elif deep or (not is_last and fnmatch.fnmatchcase(name.rpartition("/")[2], segments[0])):
            found |= _walk(system, name, segments if deep else segments[1:], visited)
    return found
