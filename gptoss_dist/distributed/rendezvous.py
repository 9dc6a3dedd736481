"""How the processes of a run find each other.

Under srun, mpirun, deepspeed, or by hand, rank 0 opens a store at MASTER_ADDR:MASTER_PORT, and every rank signs there.
torch's own way waits half an hour for those that never come, in silence. This one says within seconds who is missing
and on which host, and gives up sooner.

torchrun has a store already, and may have had it in an attempt that failed: what ranks wrote there then, such as the
addresses at which they could be reached, is still in it. So the ranks of an attempt first agree on a number that no
attempt had before, and keep to keys of that number:

    rank 1   join/1 = a word that only this process knows
    rank 0   go/WORD = 2, the number of this attempt     to each word that it finds, also to old ones, which none reads
    rank 1   arrived/2/1
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import torch.distributed as dist

from gptoss_dist.distributed import launchers
from gptoss_dist.distributed.collectives import LocalError
from gptoss_dist.distributed.hosts import by_host, expected_hosts, this_host

_RESOLVE_S = 5.0
"""How long the name of rank 0's machine may be unknown: a name server may hear of it a moment later."""
_MESSAGE_AFTER_S = 5.0
_REPEAT_S = 60.0


def check_variables(env: Mapping[str, str]) -> tuple[int, int, int]:
    """Return RANK, WORLD_SIZE and LOCAL_RANK, which are 0, 1 and 0 without a launcher.

    Raises:
        LocalError: A variable is missing, is not a number, or contradicts another.
    """
    if "RANK" not in env:
        if env.get("WORLD_SIZE", "1") != "1":
            raise LocalError(
                f"WORLD_SIZE={env['WORLD_SIZE']} is set and RANK is not; unset WORLD_SIZE for a run of one process, or "
                "start the run with torchrun, deepspeed, srun or mpirun"
            )
        return 0, 1, _number(env, "LOCAL_RANK", "0")
    rank, world_size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise LocalError(f"RANK={rank} is not below WORLD_SIZE={world_size}; give each process another rank from 0 on")
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not env.get(name):
                raise LocalError(f"RANK is set and {name} is not; set it to where rank 0 can be reached")
        if not 0 < _number(env, "MASTER_PORT") < 65536:
            raise LocalError(f"MASTER_PORT={env['MASTER_PORT']} is no port; give one from 1024 to 65535")
    return rank, world_size, _number(env, "LOCAL_RANK", "0")


def _number(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = env.get(name, default)
    if text is None:
        raise LocalError(f"RANK is set and {name} is not; start the run with torchrun, deepspeed, srun or mpirun")
    if not (text.strip().isdecimal() and text.isascii()):
        raise LocalError(f"{name}={text} is not a number from 0 on; let the launcher set it")
    return int(text)


def open_store(rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """Return the store of all ranks once they are all there.

    Args:
        rank: This rank.
        world_size: How many ranks there are.
        timeout_s: How long a rank waits for the others, unless RENDEZVOUS_TIMEOUT gives other seconds, and for a value
            in the store later on.

    Raises:
        LocalError: Some did not come in time, the address is none, the port is taken, or two processes have the same
            rank.
    """
    if world_size == 1:
        return dist.HashStore()
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR:MASTER_PORT)"
    deadline = time.monotonic() + _patience_s(timeout_s)
    _check_address(os.environ["MASTER_ADDR"], rank)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = _connect(rank, world_size, place, deadline, is_master=False)
        store.set(f"host/{rank}", this_host())
        number = _agree_on_attempt(store, rank, world_size, place, deadline)
        store.set_timeout(datetime.timedelta(seconds=timeout_s))
        return dist.PrefixStore(f"run {number}", store)
    store = _connect(rank, world_size, place, deadline, is_master=rank == 0)
    store.set(f"host/{rank}", this_host())
    if store.add(f"arrived/{rank}", 1) > 1:
        raise LocalError(f"two processes have RANK={rank} at {place}; give each another one")
    if rank == 0:
        _await_all(store, world_size, place, deadline)
        store.set("all here", "yes")
    else:
        _await_rank_0(store, place, deadline)
    store.set_timeout(datetime.timedelta(seconds=timeout_s))  # so far it had the patience of the meeting
    return dist.PrefixStore("run", store)


def _patience_s(timeout_s: float) -> float:
    text = os.environ.get("RENDEZVOUS_TIMEOUT", "")
    try:
        seconds = float(text or timeout_s)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise LocalError(f"RENDEZVOUS_TIMEOUT={text} is not a number of seconds; give one above 0, or unset it")
    return seconds


def _check_address(address: str, rank: int) -> None:
    """Raise LocalError if the name of rank 0's machine is unknown here; torch would try again for all its patience."""
    deadline = time.monotonic() + _RESOLVE_S
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (socket.gaierror, UnicodeError) as error:
            if time.monotonic() >= deadline:
                reason = getattr(error, "strerror", None) or "no name of a machine"
                raise LocalError(
                    f"MASTER_ADDR={address} cannot be resolved by rank {rank} on {this_host()} ({reason}); "
                    "set it to a name or an address at which all machines reach rank 0"
                ) from None
        time.sleep(0.5)


def _agree_on_attempt(store: dist.Store, rank: int, world_size: int, place: str, deadline: float) -> int:
    """Return the number of this attempt, in a store that may hold what earlier attempts have left."""
    if rank == 0:
        number = store.add("attempts", 1)
        _await_all(store, world_size, place, deadline, f"arrived/{number}", lambda ranks: _answer(store, ranks, number))
        return number
    word = secrets.token_hex(8)
    store.set(f"join/{rank}", word)
    try:
        store.wait([f"go/{word}"], datetime.timedelta(seconds=max(1.0, deadline - time.monotonic() + 5.0)))
    except dist.DistError:
        raise LocalError(f"rank 0 at {place} has ended, or did not come; see its message") from None
    number = int(store.get(f"go/{word}"))
    store.set(f"arrived/{number}/{rank}", "yes")
    return number


def _answer(store: dist.Store, ranks: list[int], number: int) -> None:
    """Tell ranks that have asked the number of this attempt."""
    for rank in ranks:
        if rank and store.check([f"join/{rank}"]):
            store.set(f"go/{store.get(f'join/{rank}').decode()}", str(number))


def _connect(rank: int, world_size: int, place: str, deadline: float, is_master: bool) -> dist.Store:
    patience = datetime.timedelta(seconds=max(1.0, deadline - time.monotonic()))
    try:
        with _message_if_slow(f"rank {rank} on {this_host()} waits for rank 0 at {place}"):
            return dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                world_size,
                is_master=is_master,
                timeout=patience,
                wait_for_workers=False,
            )
    except dist.DistError as error:
        if is_master:
            reason = "the port is in use" if "EADDRINUSE" in str(error) else str(error).splitlines()[0][:200]
            raise LocalError(f"rank 0 cannot listen at {place}: {reason}; set MASTER_PORT to a free one") from None
        raise LocalError(
            f"rank {rank} on {this_host()} did not reach rank 0 at {place} within {patience.total_seconds():.0f} s; "
            "start rank 0 there, or correct MASTER_ADDR and MASTER_PORT"
        ) from None


def _await_all(
    store: dist.Store,
    world_size: int,
    place: str,
    deadline: float,
    prefix: str = "arrived",
    answer: Callable[[list[int]], None] = lambda ranks: None,
) -> None:
    """Wait on rank 0 until all others have signed, and say who is missing.

    Args:
        prefix: What the keys by which they sign begin with.
        answer: Does what those wait for that are missing.
    """
    missing, message_at = list(range(1, world_size)), time.monotonic() + _MESSAGE_AFTER_S
    while missing := [rank for rank in missing if not store.check([f"{prefix}/{rank}"])]:
        answer(missing)
        now = time.monotonic()
        if now > deadline:
            named = _named(store, world_size, missing)
            raise LocalError(f"{named} did not come to {place} in time; start them, or correct WORLD_SIZE")
        if now > message_at:
            _message(f"rank 0 on {this_host()} waits at {place} for {_named(store, world_size, missing).rstrip(',')}")
            message_at = now + _REPEAT_S
        time.sleep(0.05)


def _await_rank_0(store: dist.Store, place: str, deadline: float) -> None:
    """Wait on another rank until rank 0 has seen all."""
    try:
        # A little longer than rank 0, which knows who is missing.
        store.wait(["all here"], datetime.timedelta(seconds=max(1.0, deadline - time.monotonic() + 5.0)))
    except dist.DistError:
        raise LocalError(f"rank 0 at {place} has ended, or waits for other ranks; see its message") from None


def _named(store: dist.Store, world_size: int, missing: list[int]) -> str:
    """Name ranks that are missing by their hosts, as far as these are known."""
    here = [rank for rank in range(world_size) if rank not in missing and store.check([f"host/{rank}"])]
    known = {rank: store.get(f"host/{rank}").decode() for rank in here}
    expected = expected_hosts(world_size, os.environ, known)
    return f"{len(missing)} of {world_size} ranks, {by_host(missing, expected)},"


@contextlib.contextmanager
def _message_if_slow(text: str) -> Iterator[None]:
    """Print a line if what is done in this context is not done soon."""
    timer = threading.Timer(_MESSAGE_AFTER_S, _message, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _message(text: str) -> None:
    print(f"{launchers.program()}: {text}", file=sys.stderr, flush=True)
