"""Checksums that go with an exported model: SHA-256 of every file, in the form of `sha256sum`.

`sha256sum --check SHA256SUMS` in the folder verifies them too, without this project.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch.distributed as dist

from data_pipeline.disk import write_synced
from data_pipeline.foreign import check_folder, read_text
from gptoss_dist.checkpoint.store import fingerprint
from gptoss_dist.distributed.collectives import all_gather_objects

FILE = "SHA256SUMS"


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files of `folder`."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != FILE)
    write_synced(folder / FILE, "".join(f"{fingerprint(folder / name)['sha256']}  {name}\n" for name in names))


def has_checksums(folder: str | Path) -> bool:
    """Return whether a folder carries checksums."""
    return (Path(folder) / FILE).is_file()


def altered_files(folder: str | Path) -> list[str]:
    """Return a phrase for each file that is not what was exported.

    It is collective where there are ranks, which share the work.

    Raises:
        ValueError: There are no checksums, or they are not readable.
    """
    check_folder(folder)
    folder, together = Path(folder), dist.is_initialized() and dist.get_world_size() > 1
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    expected = _read(folder / FILE)
    problems = []
    for name, digest in sorted(expected.items())[rank::ranks]:
        path = folder / name
        try:
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif fingerprint(path)["sha256"] != digest:
                problems.append(f"{name} is not what was exported (SHA-256)")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    problems += [f"{p.name} does not belong to it" for p in folder.glob("*.safetensors") if p.name not in expected]
    if together:
        problems = [problem for share in all_gather_objects(problems) for problem in share]
    return sorted(set(problems))


def _read(path: Path) -> dict[str, str]:
    """Return {file: SHA-256}; names with a folder are refused, since nothing outside of the folder belongs to it."""
    try:
        lines = read_text(path).splitlines()
    except ValueError as error:
        raise ValueError(f"{error}; restore it, or delete it if the files are to be read unchecked") from None
    found = {}
    for number, line in enumerate(lines, 1):
        entry = re.fullmatch(r"([0-9a-f]{64}) [ *]([^/\\\0]+)", line)
        if not entry or entry[2] in (".", ".."):
            raise ValueError(f"{path}, line {number}: {line[:80]!r} is not `SHA-256  FILE`, as sha256sum writes it")
        found[entry[2]] = entry[1]
    return found
