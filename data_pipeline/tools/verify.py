"""Check that a dataset is what its manifest says, byte by byte.

python -m data_pipeline.verify data/corpus --workers 8
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from data_pipeline.shards.checksums import problems, record_content
from data_pipeline.shards.manifest import Manifest
from data_pipeline.tools import command


def verify(directory: str | Path, *, workers: int = 1, report: Callable[[str], None] = print) -> str:
    """Read a whole dataset, and note in verified.json that it is sound.

    Args:
        directory: The dataset.
        workers: How many files are read at a time.
        report: Takes lines for people.

    Returns:
        A line about the dataset.

    Raises:
        ValueError: The dataset has problems. The message is one line for each of them.
    """
    manifest = Manifest.read(directory)
    start = time.perf_counter()
    if found := list(problems(directory, manifest, workers=workers, report=report)):
        raise ValueError("\nerror: ".join(found))
    seconds = time.perf_counter() - start
    record_content(directory, manifest)
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    size = sum((Path(directory) / name).stat().st_size for shard in shards for name in manifest.files(shard))
    return (
        f"{directory}: sound, {sum(shard.tokens for shard in shards):,} tokens in "
        f"{sum(shard.documents for shard in shards):,} documents, {len(shards)} shards, tokenizer "
        f"{manifest.tokenizer['name']}; {size / 1e9:.3f} GB read in {seconds:.2f} s, {size / seconds / 1e9:.2f} GB/s"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.verify",
        description="Read a whole dataset and compare it with its manifest; lists everything that is wrong.",
    )
    parser.add_argument("directory", metavar="DIR")
    default = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=default, help=f"files read at a time ({default})")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers}: must be at least 1")
    return command.run(lambda: print(verify(arguments.directory, workers=arguments.workers)))
