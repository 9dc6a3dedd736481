"""The files of a folder or a pattern on this machine: each of them once, whatever links lead to it.

corpus/a.txt                   taken
corpus/more -> elsewhere       a link to a folder: followed, so elsewhere/b.txt is taken as corpus/more/b.txt
corpus/more/up -> corpus       it leads to a folder that was visited: not followed again
corpus/first.txt -> a.txt      a link to a file that is taken already: left out
corpus/.git, corpus/README.md  hidden, and a card: left out
"""

import glob
import os
import stat
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.corpora.kinds import (
    BROKEN,
    FOLDERS,
    HIDDEN,
    LINKS,
    NO_FILES,
    PREPARED,
    PREPARED_FILE,
    PREPARED_FILES,
    PREPARED_NAMES,
    UNFINISHED_ENDING,
    UNFINISHED_FILE,
    UNREADABLE,
    LeftOut,
    why_left_out,
)


def files_of(path: Path) -> tuple[list[Path], LeftOut]:
    """Return the files of a folder, or those that match a pattern, sorted, and what was there besides.

    Args:
        path: A folder that exists, or a pattern in which `*`, `?` and `[...]` stand for parts of a name and `**` for
            any number of folders. A folder that has such characters in its own name may be named as it is.
    """
    left_out = LeftOut()
    found: Iterator[Path]
    if path.is_dir():
        found = (file for folder in _folders_below(path, left_out) for file in _entries(folder, left_out))
    else:
        found = _matching(_with_literal_beginning(path), left_out)
    return sorted(_each_once(found, left_out)), left_out


def _folders_below(root: Path, left_out: LeftOut) -> Iterator[Path]:
    """Yield a folder and those below it, each real one once; links come last, so that files have their own names."""
    visited: set[tuple[int, int]] = set()
    waiting, links = deque([root]), deque[Path]()
    while waiting or links:
        folder = waiting.popleft() if waiting else links.popleft()
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            left_out.add(UNREADABLE)
            continue
        if (status.st_dev, status.st_ino) in visited:
            left_out.add(LINKS)
            continue
        visited.add((status.st_dev, status.st_ino))
        names = {entry.name for entry in entries}
        if PREPARED_FILE in names or (folder.name.endswith(UNFINISHED_ENDING) and UNFINISHED_FILE in names):
            left_out.add(PREPARED)
            continue
        yield folder
        for entry in entries:
            if _is_folder(entry):
                if entry.name.startswith("."):
                    left_out.add(HIDDEN)
                else:
                    (links if entry.is_symlink() else waiting).append(folder / entry.name)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself; it is counted as a file
        return False


def _entries(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """Yield what is in a folder but for folders, and count what cannot be taken."""
    for name in sorted(os.listdir(folder)):
        if not (folder / name).is_dir() and _is_taken(folder / name, left_out):
            yield folder / name


def _is_taken(path: Path, left_out: LeftOut) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        left_out.add(BROKEN)
        return False
    reason = why_left_out(path.name) or (None if stat.S_ISREG(mode) else NO_FILES)
    if reason:
        left_out.add(reason)
    return reason is None


def _matching(pattern: Path, left_out: LeftOut) -> Iterator[Path]:
    """Yield the files that match a pattern, perhaps more than once; `glob` itself would follow a loop of links."""
    if "**" not in pattern.parts:
        for name in glob.glob(str(pattern)):
            if Path(name).is_dir():
                left_out.add(FOLDERS)
            elif Path(name).name in PREPARED_NAMES and (Path(name).parent / PREPARED_FILE).exists():
                left_out.add(PREPARED_FILES)
            elif _is_taken(Path(name), left_out):
                yield Path(name)
        return
    at = pattern.parts.index("**")
    beginning, rest = Path(*pattern.parts[:at]), Path(*pattern.parts[at + 1 :])
    ignored = LeftOut()  # folders match on the way to files
    for root in filter(Path.is_dir, map(Path, sorted(glob.glob(str(beginning))))):
        for folder in _folders_below(root, left_out):
            if rest.parts:
                inside = _matching(Path(glob.escape(str(folder))) / rest, ignored)
            else:
                inside = _entries(folder, left_out)
            yield from inside
    ignored.counts.pop(FOLDERS, None)
    left_out.counts += ignored.counts


def _with_literal_beginning(pattern: Path) -> Path:
    """Return the pattern with the folders at its beginning, as far as they exist, meant as they are written."""
    parts = pattern.parts
    for count in range(len(parts) - 1, 0, -1):
        beginning = Path(*parts[:count])
        if beginning.is_dir():
            return Path(glob.escape(str(beginning)), *parts[count:])
    return pattern


def _each_once(paths: Iterator[Path], left_out: LeftOut) -> Iterator[Path]:
    """Yield each file once, by its own name where that was found and not only links to it."""
    folders: dict[Path, Path] = {}
    targets: dict[Path, Path] = {}
    for path in paths:
        if path.is_symlink():
            targets[path] = path.resolve()
        else:
            if path.parent not in folders:
                folders[path.parent] = path.parent.resolve()
            targets[path] = folders[path.parent] / path.name
    own = {target for path, target in targets.items() if target == path.absolute()}
    taken: set[Path] = set()
    for path, target in targets.items():
        if target in taken or (target in own and target != path.absolute()):
            left_out.add(LINKS)
            continue
        taken.add(target)
        yield path
