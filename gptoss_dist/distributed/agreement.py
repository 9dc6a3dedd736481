"""Before anything is built, all ranks compare what must be the same everywhere: code, libraries, settings, data.

A cluster has copies of many things, and one that is old costs a day: losses that differ, or a hang in the first step.

    rank 0   node1   code: v1.2   settings: optim.lr=0.001       all ranks exchange one digest of 32 bytes
    rank 1   node1   code: v1.2   settings: optim.lr=0.001       two digests differ, so they exchange a digest of
    rank 2   node2   code: v1.2   settings: optim.lr=0.0003      each fact: the settings; and then these themselves

    node2 (rank 2) has other settings than the other ranks: optim.lr is 0.0003 instead of 0.001; ...

The majority is right, and rank 0 where there is none. The module knows nothing of the facts but their names.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from gptoss_dist.distributed.collectives import all_gather_objects
from gptoss_dist.distributed.hosts import by_host

_MOST_DIFFERENCES = 3
_MOST_CHARACTERS = 80


@dataclass(frozen=True)
class Fact:
    """Something that must be the same on all ranks."""

    name: str
    """What it is called in a message: `settings`."""
    values: Mapping[str, str]
    """Its parts, as they may be printed: `{"optim.lr": "0.001"}`."""
    remedy: str
    """What to do where it differs."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What a message also tells where the values differ, such as a revision, which not every machine can find out."""

    def digest(self) -> bytes:
        """Return a hash of 32 bytes that equal facts have in common, in any process."""
        return hashlib.sha256(json.dumps([self.name, sorted(self.values.items())]).encode()).digest()


def check_agreement(facts: Sequence[Fact], hosts: Sequence[str]) -> None:
    """Compare facts of all ranks; collective where there are ranks.

    Where all agree, which is nearly always, this is one exchange of 32 bytes for each rank.

    Args:
        facts: Those of this rank; all ranks have facts of the same names.
        hosts: The host of each rank.

    Raises:
        ValueError: Some rank differs. Every rank raises it; it names the host, the ranks and the difference.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if len(set(_all_gather_digests(hashlib.sha256(b"".join(fact.digest() for fact in facts)).digest()))) == 1:
        return
    of_ranks = all_gather_objects({fact.name: fact.digest() for fact in facts})  # [rank][name]
    differing = [fact for fact in facts if len({digests.get(fact.name) for digests in of_ranks}) > 1]
    values = all_gather_objects({fact.name: {**fact.notes, **fact.values} for fact in differing})  # [rank][name][part]
    said = [_difference(fact, [digests.get(fact.name) for digests in of_ranks], values, hosts) for fact in differing]
    raise ValueError("; ".join(said))


def _all_gather_digests(digest: bytes) -> list[bytes]:
    """Return the digests of all ranks; collective. Tensors of one size are one exchange, where objects are two."""
    mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return [bytes(tensor.tolist()) for tensor in found]


def _difference(
    fact: Fact,
    digests: Sequence[bytes | None],
    values: Sequence[Mapping[str, Mapping[str, str]]],
    hosts: Sequence[str],
) -> str:
    """Return the line about one fact.

    Args:
        fact: Any rank's, for its name and remedy.
        digests: The digest of each rank.
        values: The facts that differ of each rank, by name.
        hosts: The host of each rank.
    """
    right = _reference(digests)
    odd = [rank for rank, digest in enumerate(digests) if digest != digests[right]]
    ours, first = values[right].get(fact.name, {}), odd[0]
    # If the others differ among each other too, the line is about those that are like the first of them.
    alike = [rank for rank in odd if digests[rank] == digests[first]]
    theirs = values[first].get(fact.name, {})
    parts = [part for part in {**ours, **theirs} if ours.get(part) != theirs.get(part)]
    told = [f"{part} is {_short(theirs.get(part))} instead of {_short(ours.get(part))}" for part in parts]
    more = len(told) - _MOST_DIFFERENCES
    text = ", ".join(told[:_MOST_DIFFERENCES]) + (f" and {more} more" if more > 0 else "")
    others = f"; {by_host([r for r in odd if r not in alike], hosts)} yet others" if len(odd) > len(alike) else ""
    has = "has" if len({hosts[rank] for rank in alike}) == 1 else "have"
    return (
        f"{by_host(alike, hosts)} {has} other {fact.name} than {_named(right, digests, hosts)}: {text}{others}; "
        f"{fact.remedy}"
    )


def _reference(digests: Sequence[bytes | None]) -> int:
    """Return the first rank of the majority, or 0 if there is none."""
    (first, most), *rest = Counter(digests).most_common()
    return digests.index(first) if not rest or rest[0][1] < most else 0


def _named(right: int, digests: Sequence[bytes | None], hosts: Sequence[str]) -> str:
    alike = [rank for rank, digest in enumerate(digests) if digest == digests[right]]
    return by_host(alike, hosts) if len(alike) < 3 else f"the other {len(alike)} ranks"


def _short(value: str | None) -> str:
    if value is None:
        return "missing"
    half = _MOST_CHARACTERS // 2
    return value if len(value) <= _MOST_CHARACTERS else f"{value[:half]}...{value[-half:]}"


def source_digest(*packages: str) -> str:
    """Return a hash of the source files of packages: clusters copy trees, which then have no revision.

    Args:
        packages: Names of packages that can be imported.
    """
    total = hashlib.sha256()
    for package in packages:
        spec = find_spec(package)
        for folder in map(Path, (spec and spec.submodule_search_locations) or ()):
            for path in sorted(folder.rglob("*.py")):
                total.update(f"{package}/{path.relative_to(folder)}\0".encode())
                total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]
