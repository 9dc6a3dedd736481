"""Which machine a rank is on, so that messages name machines: what each rank says, and what launchers say before that.

    node1: ranks 0-7      node2: ranks 8-15      node3: ranks 16-23, of which none has come

A rank that has come has said where it is. Of one that has not, the launcher may have told the others: Slurm lists the
nodes of a step and the tasks on each; torchrun and MPI tell how many processes a machine has, so that another rank of
the same machine may have said its name.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_MOST_NAMED = 8


def this_host() -> str:
    """Return the name of this machine."""
    return platform.node() or "an unnamed host"


def expand(nodes: str) -> list[str]:
    """Return the names of a Slurm node list: "gpu[07-09,12],login" is gpu07, gpu08, gpu09, gpu12 and login."""
    return [name for part in re.split(r",(?![^\[]*\])", nodes) for name in _expand_part(part)]


def _expand_part(part: str) -> list[str]:
    found = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if found is None:
        return [part]
    numbers = []
    for one in found[2].split(","):
        first, _, last = one.partition("-")
        numbers += [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
    return [f"{found[1]}{number}{rest}" for number in numbers for rest in _expand_part(found[3])]


def machine() -> str:
    """Return what processes that see each other's process ids have in common: host, its boot, their namespace."""
    parts = [this_host()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            parts.append(read())
        except OSError:
            parts.append("")
    return " ".join(parts)


def tasks_of_nodes(text: str) -> list[int]:
    """Return the numbers of tasks on the nodes of a step, of which Slurm says "4(x2),3": four on two nodes, then three.

    Raises:
        ValueError: The text is another one.
    """
    counts = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def expected_hosts(world_size: int, env: Mapping[str, str], known: Mapping[int, str]) -> dict[int, str]:
    """Return where ranks are that have not said it, as far as the launcher's variables and other ranks tell.

    Args:
        world_size: How many ranks there are.
        env: The variables of this process.
        known: The hosts of the ranks that have said theirs.
    """
    return _by_slurm(world_size, env) or _by_neighbours(world_size, env, known)


def _by_slurm(world_size: int, env: Mapping[str, str]) -> dict[int, str]:
    """Return the hosts of all ranks if srun has started one for each task, node after node."""
    nodes, tasks = env.get("SLURM_STEP_NODELIST"), env.get("SLURM_STEP_TASKS_PER_NODE")
    across_nodes = env.get("SLURM_DISTRIBUTION", "block").split(":")[0]
    if not nodes or not tasks or across_nodes != "block":
        return {}
    try:
        names = [host for host, count in zip(expand(nodes), tasks_of_nodes(tasks)) for _ in range(count)]
    except ValueError:
        return {}
    return dict(enumerate(names)) if len(names) == world_size else {}  # else another launcher in each task


def _by_neighbours(world_size: int, env: Mapping[str, str], known: Mapping[int, str]) -> dict[int, str]:
    size = env.get("LOCAL_WORLD_SIZE", "")
    if not size.isdecimal() or int(size) == 0 or world_size % int(size):
        return {}
    of_machine = {rank // int(size): host for rank, host in known.items()}
    found = {}
    for rank in range(world_size):
        number = rank // int(size)
        found[rank] = of_machine.get(number, f"host {number + 1} of {world_size // int(size)}")
    return found


def by_host(ranks: Sequence[int], hosts: Mapping[int, str] | Sequence[str]) -> str:
    """Name ranks by their hosts: "node2 (ranks 8-15), node3 (rank 16)".

    Args:
        ranks: Numbers of ranks, in order.
        hosts: The host of each rank by its number, as far as they are known.
    """
    known = hosts if isinstance(hosts, Mapping) else dict(enumerate(hosts))
    of_host: dict[str | None, list[int]] = {}
    for rank in ranks:
        of_host.setdefault(known.get(rank), []).append(rank)
    named = [f"{host} ({listed(found)})" if host else listed(found) for host, found in of_host.items()]
    more = len(named) - _MOST_NAMED
    return ", ".join(named[:_MOST_NAMED]) + (f" and {more} more hosts" if more > 0 else "")


def listed(ranks: Sequence[int]) -> str:
    """Write numbers of ranks in short: "rank 3", "ranks 0-7, 9"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    shown = ", ".join(texts[:_MOST_NAMED]) + (", ..." if len(texts) > _MOST_NAMED else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
