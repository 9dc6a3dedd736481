"""Processes that make pieces side by side, and end with the process that started them."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from data_pipeline.corpora.part import Part
from data_pipeline.disk import forget_locks
from data_pipeline.prepare.part import Piece, make_piece
from data_pipeline.prepare.rules import Rules
from data_pipeline.tokenizer.tokenizer import Tokenizer

# What a worker works with, set once when it starts.
_tokenizer: Tokenizer | None = None
_counters = None


def make_pieces(
    parts: list[Part],
    keys: list[str],
    directory: Path,
    rules: Rules,
    tokenizer: Tokenizer,
    workers: int,
    watch: Callable[[int, int], None],
) -> Iterator[tuple[int, Piece]]:
    """Yields (index of the part, its piece) as they are done; stops making more when the consumer does.

    keys: of the pieces. directory: for the pieces; the tokenizer is saved there. workers: 1 works in this process.
    watch: called with the numbers of documents and tokens done so far, several times a second. Raises ValueError when a
    part cannot be read, the tokenizer's engine cannot be used or a worker died.
    """
    if workers == 1:
        totals = [0, 0]

        def progress(documents: int, tokens: int) -> None:
            totals[0] += documents
            totals[1] += tokens
            watch(*totals)

        for index, part in enumerate(parts):
            yield index, make_piece(directory, part, keys[index], rules, tokenizer, progress)
        return

    context = multiprocessing.get_context(_start_method())
    if context.get_start_method() == "fork":
        tokenizer.load_engine()  # a thread that it starts does not come along, and is not needed: nothing is parallel
    counters = context.Array("q", 2)
    shared = tokenizer if context.get_start_method() == "fork" else directory  # where it is saved
    arguments = (shared, tokenizer.engine, counters, os.getpid())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=arguments)
    left, running = iter(enumerate(parts)), {}

    def submit() -> None:
        # A few more than are at work, so that none waits; not all, because of what each future holds.
        while len(running) < 2 * workers and (following := next(left, None)) is not None:
            index, part = following
            running[_submit(pool, directory, part, keys[index], rules)] = index

    try:
        submit()
        while running:
            done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            watch(*counters[:])
            for future in done:
                yield running.pop(future), future.result()
            submit()
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


def _submit(pool: ProcessPoolExecutor, directory: Path, part: Part, key: str, rules: Rules) -> Future:
    try:
        return pool.submit(_make_piece, directory, part, key, rules)
    except (OSError, RuntimeError) as error:  # a pool that is just breaking fails in several ways
        raise BrokenProcessPool(str(error)) from error


def _start_method() -> str:
    """`fork` starts at once and shares the tokenizer, but not after libraries have started threads of their own.
    gigatoken imports pyarrow, whose one thread then is its allocator's, made for forks; its modules that read start
    others.
    """
    reading = {f"pyarrow._{name}" for name in ("parquet", "dataset", "csv", "json", "fs", "flight")}
    threaded = ({"torch", "datasets"} | reading) & sys.modules.keys()
    return "spawn" if threaded or threading.active_count() > 1 else "fork"


def _start_worker(tokenizer: Tokenizer | Path, engine: str, counters, parent: int) -> None:
    global _tokenizer, _counters
    forget_locks()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    _tokenizer.engine, _counters = engine, counters


def _end_with(parent: int) -> None:
    """A worker of a killed process would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _make_piece(directory: Path, part: Part, key: str, rules: Rules) -> Piece:
    def progress(documents: int, tokens: int) -> None:
        with _counters.get_lock():
            _counters[0] += documents
            _counters[1] += tokens

    return make_piece(directory, part, key, rules, _tokenizer, progress)
