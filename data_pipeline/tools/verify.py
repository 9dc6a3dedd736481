"""Check that a dataset is what its manifest says, byte by byte.

python -m data_pipeline.verify data/corpus --workers 8
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.command_line import MISTAKE, Program, positional, print_line, ranged, run
from data_pipeline.shards.checksums import problems, record_content
from data_pipeline.shards.manifest import FILE_NAME, Manifest


class DamageError(ValueError):
    """A dataset has problems; the message is one line for each of them."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


def verify(directory: str | Path, *, workers: int = 1, report: Callable[[str], None] = print) -> str:
    """Read a whole dataset, and note in verified.json that it is sound.

    Args:
        directory: The dataset.
        workers: How many files are read at a time.
        report: Takes lines for people.

    Returns:
        A line about the dataset.

    Raises:
        DamageError: The dataset has problems.
        ValueError: There is no dataset, or its manifest is damaged.
    """
    manifest = Manifest.read(directory)
    start = time.perf_counter()
    if found := list(problems(directory, manifest, workers=workers, report=report)):
        raise DamageError(found)
    seconds = time.perf_counter() - start
    record_content(directory, manifest)
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    size = sum((Path(directory) / name).stat().st_size for shard in shards for name in manifest.files(shard))
    return (
        f"{directory}: sound, {sum(shard.tokens for shard in shards):,} tokens in "
        f"{sum(shard.documents for shard in shards):,} documents, {len(shards)} shards, tokenizer "
        f"{manifest.tokenizer['name']}; {size / 1e9:.3f} GB read in {seconds:.2f} s, {size / seconds / 1e9:.2f} GB/s"
    )


@dataclass
class VerifyOptions:
    """Read a whole dataset and compare it with its manifest; lists everything that is wrong."""

    directory: str = positional("DIR")
    """A prepared dataset."""
    workers: int = ranged(default_factory=lambda: len(os.sched_getaffinity(0)), at_least=1)
    """Files read at a time."""


_PROGRAM = Program("python -m data_pipeline.verify")


def main(argv: list[str] | None = None) -> int:
    """Verify what the command line names; return the exit code: 1 for damage, 2 where there is no dataset."""
    return run(_PROGRAM, VerifyOptions, _verify, argv)


def _verify(options: VerifyOptions) -> int | None:
    if not (Path(options.directory) / FILE_NAME).exists():
        try:
            Manifest.read(options.directory)
        except ValueError as error:
            _PROGRAM.report(error)
            return MISTAKE
    try:
        print_line(verify(options.directory, workers=options.workers, report=print_line))
    except DamageError as damage:
        for problem in damage.problems:
            _PROGRAM.report(problem)
        return _PROGRAM.failed
    return None
