#!/usr/bin/env python
"""The mode `peer` of launch/benchmark_data.py: datatrove beside `prepare`, in turns of one run.

Two files of .jsonl become tokens on disk, with two processes each and the same tokenizer; datatrove reads it as the
tokenizer.json that this project exports. Both write each document with its end-of-text token in the order of the files,
so their ids are compared byte for byte, in every turn. datatrove's settings are those that are the fastest on a tenth
of the text. `prepare` runs twice with each engine: as datatrove does it, without looking for copies and holding out
nothing, and with its defaults. Not counted: imports, loading the tokenizer. CPU time is that of all processes; on a
machine that others use it is the surer comparison.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.benchmarks.protocol import Spread, environment, progress, rounds, run_worker

WORKERS = 2
WAYS = ((2, 1, 10_000), (2, 1, 1000), (1, 2, 1000))
"""What is tried of datatrove: workers, threads of Hugging Face's tokenizers in each, documents tokenized together."""
COMPETITORS = {
    "datatrove": "datatrove",
    "tiktoken": "this project, tiktoken",
    "tiktoken-defaults": "this project, tiktoken, with copies and validation",
    "gigatoken": "this project, gigatoken",
    "gigatoken-defaults": "this project, gigatoken, with copies and validation",
}


def peer_benchmark(arguments: argparse.Namespace) -> None:
    """Measure all competitors, and print the medians and the ratios.

    Args:
        arguments: `tokenizer`, `megabytes`, `rounds`, `directory` and `peer_python`, an interpreter that has datatrove.

    Raises:
        SystemExit: datatrove is not installed there, or the two made different tokens.
    """
    _check_datatrove(arguments.peer_python)
    names = [name for name in COMPETITORS if not name.startswith("gigatoken") or _has_gigatoken()]
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        folder = Path(name)
        size, documents = make_files(folder / "corpus", arguments.megabytes, arguments.tokenizer)
        _export_tokenizer(folder, arguments.tokenizer)
        progress(f"{size / 1e6:.0f} MB of text in {documents:,} documents are written")
        way = _fastest_way(folder, arguments)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for round_ in rounds(arguments.rounds):
            for competitor in names if round_ % 2 == 0 else reversed(names):
                results[competitor].append(_run(competitor, folder / "corpus", arguments, way))
                found = results[competitor][-1]
                progress(f"{COMPETITORS[competitor]}: {found['tokens'] / found['seconds'] / 1e6:.2f} M tokens/s")
                _check_same(results)
    print(f"{size / 1e6:.0f} MB of text, tokenizer {arguments.tokenizer}, {arguments.rounds} rounds; medians")
    print(f"datatrove: {way[0]} workers of {way[1]} threads, {way[2]:,} documents together")
    _report(results)


def _fastest_way(folder: Path, arguments: argparse.Namespace) -> tuple[int, int, int]:
    make_files(folder / "tenth", max(1, arguments.megabytes // 10), arguments.tokenizer)
    seconds = {}
    for way in WAYS:
        seconds[way] = _run("datatrove", folder / "tenth", arguments, way)["seconds"]
        progress(f"datatrove, {way[0]} workers of {way[1]} threads, {way[2]:,} documents: {seconds[way]:.0f} s")
    return min(seconds, key=seconds.__getitem__)


def _has_gigatoken() -> bool:
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        print("gigatoken is not installed (the extra `fast`): not measured")
        return False
    return True


def _check_datatrove(python: str) -> None:
    try:
        subprocess.run([python, "-c", "import datatrove.pipeline.tokens, orjson"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"--peer-python {python}: has no datatrove with orjson and tokenizers; install the extra `peers`, or name "
            f"the interpreter of an environment that has them"
        ) from error


def make_files(folder: Path, megabytes: int, tokenizer_name: str) -> tuple[int, int]:
    """Write Python sources of this environment as two .jsonl files; where they are too few, again with another line.

    Texts that spell a special token are left out: Hugging Face's tokenizers make the token of them, and `prepare` text.

    Returns:
        The bytes of text, and the number of documents.
    """
    from data_pipeline import load_tokenizer, open_source

    specials = load_tokenizer(tokenizer_name).special_tokens
    texts = [t for t in dict.fromkeys(open_source("installed").documents()) if not any(s in t for s in specials)]
    folder.mkdir()
    size = documents = 0
    with (
        open(folder / "0.jsonl", "w", encoding="utf-8") as first,
        open(folder / "1.jsonl", "w", encoding="utf-8") as other,
    ):
        copy = 0
        while size < megabytes << 20:
            for text in texts:
                text = f"# copy {copy}\n{text}" if copy else text
                (other if size > megabytes << 19 else first).write(json.dumps({"text": text}) + "\n")
                size, documents = size + len(text.encode()), documents + 1
                if size >= megabytes << 20:
                    break
            copy += 1
    return size, documents


def _export_tokenizer(folder: Path, tokenizer_name: str) -> None:
    from data_pipeline import load_tokenizer
    from data_pipeline.tokenizer.huggingface import huggingface_files

    contents = huggingface_files(load_tokenizer(tokenizer_name), 1 << 20)["tokenizer.json"]
    (folder / "tokenizer.json").write_text(json.dumps(contents), encoding="utf-8")


def _run(competitor: str, corpus: Path, arguments: argparse.Namespace, way: tuple[int, int, int]) -> dict[str, Any]:
    from data_pipeline import load_tokenizer

    output = corpus.with_name("out")
    shutil.rmtree(output, ignore_errors=True)
    if competitor == "datatrove":
        workers, threads, batch = way
        command = [arguments.peer_python, str(Path(__file__).with_name("datatrove_worker.py"))]
        command += ["--tokenizer", str(corpus.with_name("tokenizer.json")), "--workers", str(workers)]
        command += ["--eos", load_tokenizer(arguments.tokenizer).eot_token, "--batch", str(batch)]
        parallel = str(threads > 1).lower()
        env = environment(1, TOKENIZERS_PARALLELISM=parallel, RAYON_NUM_THREADS=str(threads))
    else:
        engine = competitor.partition("-")[0]
        command = [sys.executable, __file__, "--tokenizer", arguments.tokenizer, "--engine", engine]
        command += ["--defaults"] if competitor.endswith("-defaults") else []
        env = environment(1)
    try:
        return run_worker(competitor, [*command, "--corpus", str(corpus), "--output", str(output)], env)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def _check_same(results: dict[str, list[dict[str, Any]]]) -> None:
    """Check that all made the same ids in the same order, where nothing is left out or held out.

    Raises:
        SystemExit: They did not.
    """
    found = {
        (name, result["tokens"], result["digest"])
        for name, turns in results.items()
        for result in turns
        if not name.endswith("-defaults")
    }
    if len({(tokens, digest) for _, tokens, digest in found}) > 1:
        raise SystemExit(f"the competitors made different tokens, so their times mean nothing: {sorted(found)}")


def _report(results: dict[str, list[dict[str, Any]]]) -> None:
    first = results["datatrove"][0]
    print(f"tokens: {first['tokens']:,}, the same ids from all but those with copies and validation")
    for name, turns in results.items():
        rate, per_cpu = (
            Spread.of(result["tokens"] / result[of] / 1e6 for result in turns) for of in ("seconds", "cpu")
        )
        print(f"  {COMPETITORS[name]:<54}{rate:.2f} M tokens/s, {per_cpu:.2f} M tokens per CPU second")
    peer = results["datatrove"]
    for name, turns in results.items():
        if name != "datatrove":
            faster, cheaper = (
                Spread.of_ratios([result[of] for result in peer], [result[of] for result in turns])
                for of in ("seconds", "cpu")
            )
            print(f"{COMPETITORS[name]}, against datatrove: {faster:.1f} times as fast, {cheaper:.1f} in CPU time")


def prepare_once(arguments: argparse.Namespace) -> None:
    """Run `prepare` in this process, and print tokens, seconds and a hash of all ids."""
    from data_pipeline import load_tokenizer
    from data_pipeline.corpora.sources import open_source
    from data_pipeline.prepare.pipeline import prepare

    tokenizer = load_tokenizer(arguments.tokenizer)
    tokenizer.engine = arguments.engine
    tokenizer.load_engine()
    options = {} if arguments.defaults else {"deduplicate": False, "validation_fraction": 0.0}
    start, cpu = time.perf_counter(), sum(os.times()[:4])
    source = open_source(arguments.corpus)
    manifest = prepare([source], arguments.output, tokenizer, workers=WORKERS, report=lambda line: None, **options)
    seconds, cpu = time.perf_counter() - start, sum(os.times()[:4]) - cpu
    digest = hashlib.sha256()
    for shard in manifest.splits["train"]:
        digest.update((Path(arguments.output) / f"{shard.name}.bin").read_bytes())
    tokens = sum(manifest.tokens(split) for split in manifest.splits)
    print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu": cpu, "digest": digest.hexdigest()}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for option in ("tokenizer", "engine", "corpus", "output"):
        parser.add_argument(f"--{option}", required=True)
    parser.add_argument("--defaults", action="store_true")
    prepare_once(parser.parse_args())
