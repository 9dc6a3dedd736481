"""Parts prepared by the machines of a Ray cluster (https://docs.ray.io), or by Ray on this machine alone.

Each part is a task for one processor. A task whose process or machine is lost is begun anew by Ray, elsewhere, and
writes the same files under the same names. They are in the folder of the preparation, which all machines must share;
through Ray go only what names a part, and its record.
"""

import contextlib
import functools
import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.corpora.part import Part
from data_pipeline.prepare.part import Preparation, PreparedPart, part_key, prepare_part, tokenizer_folder
from data_pipeline.prepare.rules import Rules
from data_pipeline.printable import first_line
from data_pipeline.tokenizer.tokenizer import Tokenizer

_MOST_LOSSES = 5
"""How often a part is begun anew because its process or machine was lost."""
_PATIENCE_S = 10.0
_ARRIVAL_S = 90.0
"""What another machine has written on NFS is seen here after some seconds, a minute at most."""


def prepare_parts_on_ray(
    parts: dict[str, Part],
    preparation: Preparation,
    workers: int | None,
    watch: Callable[[int, int], None],
    report: Callable[[str], None],
) -> Generator[PreparedPart, None, None]:
    """Yield prepared parts as they are done; prepare no more of them when the consumer stops.

    Args:
        parts: The parts by their keys, in the order in which they are begun.
        preparation: What they have in common.
        workers: The most parts at a time; None is as many as the machines have processors, also those that come later.
        watch: Called with the numbers of documents and tokens of the parts that are done.
        report: Gets a line about the cluster.

    Raises:
        ValueError: There is no Ray, a part cannot be read, or its process died again and again.
        OSError: The files cannot be written.
    """
    with _connected(workers, report) as ray:
        setup = ray.put(
            _Setup(
                preparation.folder,
                preparation.rules,
                preparation.tokenizer.sha256,
                preparation.tokenizer.engine,
                tuple(sys.path),
            )
        )
        task = ray.remote(num_cpus=1, max_retries=_MOST_LOSSES)(_prepare_on_worker)
        waiting, documents, tokens = iter(parts.items()), 0, 0
        running: dict[Any, str] = {}
        try:
            while True:
                # Some wait, so that no processor does, and that a cluster which grows by itself sees a need.
                most = workers or 2 * max(int(ray.cluster_resources().get("CPU", 1)), 1)
                while len(running) < most and (following := next(waiting, None)) is not None:
                    running[task.remote(setup, *following)] = following[1].name
                if not running:
                    break
                for done in ray.wait(list(running), timeout=1.0)[0]:
                    part = _result(ray, done, running.pop(done))
                    _await_arrival(preparation.folder, part)
                    documents += part.documents
                    tokens += sum(shard.tokens for shards in part.shards.values() for shard in shards)
                    yield part
                watch(documents, tokens)
        finally:
            for unwanted in running:
                with contextlib.suppress(Exception):
                    ray.cancel(unwanted, force=True)
            with contextlib.suppress(Exception):  # they are not to write into a folder that is being published
                ray.wait(list(running), num_returns=len(running), timeout=_PATIENCE_S)


@contextlib.contextmanager
def _connected(workers: int | None, report: Callable[[str], None]) -> Generator[Any, None, None]:
    """Give Ray's module, connected to the cluster of RAY_ADDRESS, or to one that is begun on this machine."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("--executor ray: Ray is not installed; sh launch/install.sh --extras ray") from error
    if ray.is_initialized():  # by the program that calls this
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(_MOST_LOSSES))  # by default without an end
    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address:
            _check_reachable(address)
            ray.init(address, **quiet)
        else:
            ray.init("local", num_cpus=workers, include_dashboard=False, **quiet)
    except Exception as error:  # such as another version of Python there
        raise ValueError(
            f"--executor ray: no connection to Ray, RAY_ADDRESS={address or ''}: {first_line(error)}; `ray start` "
            "begins it there, and without RAY_ADDRESS it is begun here"
        ) from error
    try:
        machines = [node for node in ray.nodes() if node["Alive"]]
        processors = int(ray.cluster_resources().get("CPU", 0))
        where = f"at {address}" if address else "on this machine, as RAY_ADDRESS is not set"
        report(f"Ray {where}: {processors} processors on {len(machines)} machines")
        yield ray
    finally:
        ray.shutdown()


def _await_arrival(folder: Path, part: PreparedPart) -> None:
    """Wait until this machine sees a part that another one may have written.

    Raises:
        ValueError: It does not.
    """
    deadline = time.monotonic() + _ARRIVAL_S
    while PreparedPart.read(folder, part.key) is None:
        if time.monotonic() > deadline:
            raise ValueError(
                f"{folder}: a part that another machine has prepared ({part.source}) does not appear here; choose an "
                "--output on a file system that all machines of Ray share"
            )
        time.sleep(0.5)


def _check_reachable(address: str) -> None:
    """Check that something listens at HOST:PORT; Ray would try for ever."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE_S).close()


def _result(ray: Any, done: Any, name: str) -> PreparedPart:
    """Return what a task has returned, or raise what it has raised."""
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (ValueError, OSError)):
            raise error.cause from None
        raise ValueError(f"{name}: {first_line(error.cause)}") from error
    except ray.exceptions.RayError as error:
        raise ValueError(
            f"{name}: was lost {_MOST_LOSSES + 1} times with its process or machine ({first_line(error)}); out of "
            "memory? The same command continues"
        ) from error


@dataclass(frozen=True)
class _Setup:
    """What all tasks have in common."""

    folder: Path
    """That of the preparation, like the rules."""
    rules: Rules
    tokenizer: str
    """Its SHA-256; it is loaded from `tokenizer_folder`."""
    engine: str
    """What tokenizes."""
    path: tuple[str, ...]
    """Where the process that asks for it all imports from; filters may be there."""


def _prepare_on_worker(setup: _Setup, key: str, part: Part) -> PreparedPart:
    sys.path += [place for place in setup.path if place not in sys.path]
    preparation = _preparation(setup)
    if part_key(part, preparation.rules, preparation.tokenizer) != key:
        raise ValueError(f"{platform.node()}: has another version of data_pipeline; install the same on all machines")
    return prepare_part(part, key, preparation)


@functools.lru_cache(maxsize=1)
def _preparation(setup: _Setup) -> Preparation:
    try:
        tokenizer = Tokenizer.load(tokenizer_folder(setup.folder, setup.tokenizer))
    except ValueError as error:
        raise ValueError(
            f"{setup.folder}: is not on {platform.node()}, or another folder there ({error}); choose an --output on a "
            "file system that all machines of Ray share"
        ) from error
    tokenizer.engine = setup.engine
    return Preparation(setup.folder, setup.rules, tokenizer)
