"""The mode `ray` of launch/benchmark_data.py: `prepare --executor ray` beside `--workers 2`, in turns of one run.

Two nodes of Ray with one processor each are started on this machine, on a port of their own, and stopped at the end.
Both sides begin with a new process, and their bytes are compared in every turn.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.benchmarks.peer import make_files
from launch.benchmarks.protocol import Spread, environment, progress, rounds

START_S = 120
"""The most seconds that a node may take to start, or a corpus to be prepared for each 10 MB."""


def ray_benchmark(arguments: argparse.Namespace) -> None:
    """Measure both, and print the medians and the ratio.

    Args:
        arguments: `tokenizer`, `megabytes`, `rounds` and `directory`.

    Raises:
        SystemExit: Ray is not installed, or both made different bytes.
    """
    ray = Path(sys.executable).with_name("ray")
    if not ray.exists():
        raise SystemExit("Ray is not installed here: sh launch/install.sh --extras ray")
    seconds: dict[str, list[float]] = {"--workers 2": [], "--executor ray": []}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        folder = Path(name)
        size, documents = make_files(folder / "corpus", arguments.megabytes, arguments.tokenizer)
        progress(f"{size / 1e6:.0f} MB of text in {documents:,} documents are written")
        with _two_nodes(ray, folder / "ray") as address:
            for round_ in rounds(arguments.rounds):
                digests = set()
                for way in seconds if round_ % 2 == 0 else reversed(seconds):
                    taken, digest = _prepare(way, folder, arguments, address)
                    seconds[way].append(taken)
                    digests.add(digest)
                    progress(f"{way}: {taken:.1f} s")
                if len(digests) > 1:
                    raise SystemExit("both made different bytes")
    print(f"{size / 1e6:.0f} MB of text, tokenizer {arguments.tokenizer}, {arguments.rounds} rounds; the same bytes")
    ratio = Spread.of_ratios(seconds["--executor ray"], seconds["--workers 2"])
    print(f"--executor ray takes {ratio:.2f} times as long as --workers 2")


def _prepare(way: str, folder: Path, arguments: argparse.Namespace, address: str) -> tuple[float, str]:
    """Return the seconds of one preparation, and a hash of the dataset."""
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "data_pipeline.prepare", str(folder / "corpus"), "--output", str(output)]
    command += ["--tokenizer", arguments.tokenizer, *way.split()]
    started = time.perf_counter()
    variables = environment(1) | _AUTHENTICATION | {"RAY_ADDRESS": address}
    limit_s = START_S * max(1, arguments.megabytes // 10)
    subprocess.run(command, check=True, env=variables, stdout=subprocess.DEVNULL, timeout=limit_s)
    taken = time.perf_counter() - started
    digest = hashlib.sha256()
    for path in sorted(output.iterdir()):
        if path.suffix in (".bin", ".idx"):
            digest.update(path.name.encode() + path.read_bytes())
    return taken, digest.hexdigest()


_AUTHENTICATION = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def _two_nodes(ray: Path, folder: Path) -> Iterator[str]:
    """Start a cluster of two nodes of one processor each; give its address."""
    port = 6399
    variables = os.environ | _AUTHENTICATION
    options = ["--num-cpus", "1", "--disable-usage-stats"]
    head = ["--head", "--port", str(port), "--include-dashboard", "false"]

    def start(*arguments: str) -> None:
        command = [str(ray), "start", *arguments, *options]
        subprocess.run(command, check=True, env=variables, stdout=subprocess.DEVNULL, timeout=START_S)

    try:
        start(*head)
        address = f"127.0.0.1:{port}"
        start("--address", address)
        yield address
    finally:
        subprocess.run([str(ray), "stop", "--force"], env=variables, stdout=subprocess.DEVNULL, timeout=START_S)
