"""Processes that prepare parts side by side, and end with the process that started them."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path

from data_pipeline.corpora.part import Part
from data_pipeline.disk import forget_locks, remove_unfinished, unfinished_files
from data_pipeline.ownership import HEARTBEAT
from data_pipeline.prepare.part import Preparation, PreparedPart, prepare_part, tokenizer_folder
from data_pipeline.prepare.rules import Rules
from data_pipeline.tokenizer.tokenizer import Tokenizer


def prepare_parts(
    parts: dict[str, Part], preparation: Preparation, workers: int, watch: Callable[[int, int], None]
) -> Generator[PreparedPart, None, None]:
    """Yield prepared parts as they are done; prepare no more of them when the consumer stops.

    Args:
        parts: The parts by their keys, in the order in which they are begun.
        preparation: What they have in common.
        workers: The number of processes; 1 works in this process.
        watch: Called with the numbers of documents and tokens done so far, several times a second.

    Raises:
        ValueError: A part cannot be read, the tokenizer's engine cannot be used, or a worker died.
    """
    if workers == 1:
        yield from _prepare_in_turn(parts, preparation, watch)
    else:
        yield from _prepare_side_by_side(parts, preparation, workers, watch)


def _prepare_in_turn(
    parts: dict[str, Part], preparation: Preparation, watch: Callable[[int, int], None]
) -> Iterator[PreparedPart]:
    totals = [0, 0]

    def report_progress(documents: int, tokens: int) -> None:
        totals[0] += documents
        totals[1] += tokens
        watch(*totals)

    for key, part in parts.items():
        yield prepare_part(part, key, preparation, report_progress)


def _prepare_side_by_side(
    parts: dict[str, Part], preparation: Preparation, workers: int, watch: Callable[[int, int], None]
) -> Iterator[PreparedPart]:
    before = unfinished_files(preparation.folder, parts)
    pool, counters = _start_pool(preparation, workers)
    waiting = iter(parts.items())
    running: set[Future] = set()
    try:
        _submit_some(pool, waiting, running, 2 * workers)
        while running:
            done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            watch(*counters[:])
            for future in done:
                running.remove(future)
                yield future.result()
            _submit_some(pool, waiting, running, 2 * workers)
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process died (out of memory?); the same command continues, with fewer --workers perhaps"
        ) from error
    finally:
        if running:  # what they are at is written under another name
            for process in list((pool._processes or {}).values()):
                process.kill()
        with contextlib.suppress(OSError):  # a pool that broke has closed its pipes
            pool.shutdown(cancel_futures=True)
        if running:  # a full disk has no room for what nobody will finish
            remove_unfinished(preparation.folder, parts, but=before)


def _submit_some(
    pool: ProcessPoolExecutor, waiting: Iterator[tuple[str, Part]], running: set[Future], most: int
) -> None:
    """Submit parts until `most` are running.

    That is a few more than are at work, so that no process waits; it is not all of them, because of what each future
    holds.
    """
    while len(running) < most and (following := next(waiting, None)) is not None:
        try:
            running.add(pool.submit(_prepare_in_worker, *following))
        except (OSError, RuntimeError) as error:  # a pool that is just breaking fails in several ways
            raise BrokenProcessPool(str(error)) from error


def _start_pool(preparation: Preparation, workers: int) -> tuple[ProcessPoolExecutor, SynchronizedArray]:
    """Return a pool, and the numbers of documents and tokens that its processes have done."""
    context = multiprocessing.get_context(_start_method())
    forked = context.get_start_method() == "fork"
    tokenizer = preparation.tokenizer
    if forked:
        tokenizer.load_engine()  # a thread that it starts does not come along, and is not needed: nothing is parallel
    setup = _WorkerSetup(
        folder=preparation.folder,
        rules=preparation.rules,
        tokenizer=tokenizer if forked else None,
        tokenizer_folder=tokenizer_folder(preparation.folder, tokenizer.sha256),
        engine=tokenizer.engine,
        counters=context.Array("q", 2),
        parent=os.getpid(),
    )
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(setup,))
    return pool, setup.counters


def _start_method() -> str:
    """Return "fork" where it is safe, else "spawn".

    `fork` starts at once and shares the tokenizer, but not after libraries have started threads of their own. The one
    that keeps a folder's ownership holds nothing that a worker needs. gigatoken imports pyarrow, whose one thread then
    is its allocator's, made for forks; its modules that read start others.
    """
    reading = {f"pyarrow._{name}" for name in ("parquet", "dataset", "csv", "json", "fs", "flight")}
    threaded = ({"torch", "datasets"} | reading) & sys.modules.keys()
    started = {thread.name for thread in threading.enumerate()} - {threading.main_thread().name, HEARTBEAT}
    return "spawn" if threaded or started else "fork"


@dataclass(frozen=True)
class _WorkerSetup:
    """What a worker process starts with."""

    folder: Path
    """That of the preparation, like the rules."""
    rules: Rules
    tokenizer: Tokenizer | None
    """That of the preparation; a process that was not forked gets None, and loads it."""
    tokenizer_folder: Path
    """From where."""
    engine: str
    """What tokenizes."""
    counters: SynchronizedArray
    """Documents and tokens that all workers have done."""
    parent: int
    """The process that the worker ends with."""


# A pool hands its tasks to a function by name, so what a worker process was started with has to be found from there.
_preparation: Preparation
_counters: SynchronizedArray


def _start_worker(setup: _WorkerSetup) -> None:
    global _preparation, _counters
    forget_locks()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    threading.Thread(target=_exit_with_parent, args=(setup.parent,), daemon=True).start()
    tokenizer = setup.tokenizer or Tokenizer.load(setup.tokenizer_folder)
    tokenizer.engine = setup.engine
    _preparation, _counters = Preparation(setup.folder, setup.rules, tokenizer), setup.counters


def _exit_with_parent(parent: int) -> None:
    """End this process after its parent; a worker of a killed process would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _prepare_in_worker(key: str, part: Part) -> PreparedPart:
    def report_progress(documents: int, tokens: int) -> None:
        with _counters.get_lock():
            _counters[0] += documents
            _counters[1] += tokens

    return prepare_part(part, key, _preparation, report_progress)
