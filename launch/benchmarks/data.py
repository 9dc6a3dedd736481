#!/usr/bin/env python
"""Measure how fast text becomes shards, and shards become batches, beside what others do, in one run.

    python launch/benchmark_data.py prepare --tokenizer o200k_harmony [--megabytes 200] [--rounds 3]
    python launch/benchmark_data.py load [--gigabytes 1]
    python launch/benchmark_data.py peer --tokenizer o200k_harmony [--peer-python PYTHON]
    python launch/benchmark_data.py ray --tokenizer o200k_harmony

`prepare` times the way from a .jsonl file to tokens on disk, each competitor in a process of its own, in turns, with
the same tokenizer: tiktoken alone on texts in memory (nothing is written), with the pattern as published and as
`tokenizer.patterns.for_fancy_regex` writes it, the latter also in two processes that share nothing, which shows
what the cores can do; this project with one and with two processes, and with gigatoken if it is installed; the scheme
of Megatron-LM's tools/preprocess_data.py (a pool of processes that hand lists of ids to one writer); `datasets.map`.
Not counted: imports, loading the tokenizer and its engine (of gigatoken: half a second).
`load` times random access to packed batches on one core: an epoch in ten parts, and which of these had the core to
themselves.
`peer` compares `prepare` with datatrove, see peer.py; `ray` both executors of `prepare`, see ray_nodes.py.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.benchmarks.arguments import Parser, amount, whole
from launch.benchmarks.peer import peer_benchmark
from launch.benchmarks.protocol import Spread, add_quick, progress, rounds, run_worker
from launch.benchmarks.ray_nodes import ray_benchmark

PARTS = 10
"""Parts of an epoch that is timed; what else the machine does shows as the difference between them."""
WHOLE_CORE = 0.75, 0.95
"""The shares from which on a part of an epoch counts as having had a whole core.

The first is the speed of a loop, timed just before and after the part, as a share of the fastest (beside a busy
hardware thread, which may be another machine's, it is about half). The second is the share of the part's time on the
CPU.
"""
COMPETITORS = {
    "tiktoken": "tiktoken alone, texts in memory",
    "pattern": "the same with our form of its pattern",
    "pattern2": "the same, 2 processes, half of the texts each",
    "ours1": "this project, 1 process",
    "ours2": "this project, 2 processes",
    "fast1": "this project, gigatoken, 1 process",
    "fast2": "this project, gigatoken, 2 processes",
    "megatron": "Megatron-LM's scheme, 2 processes",
    "datasets": "datasets.map, 2 processes",
}


def clocks() -> np.ndarray:
    """Return seconds, and CPU seconds of this process and of those that it waited for."""
    return np.array([time.perf_counter(), sum(os.times()[:4])])


def loop_speed() -> float:
    """Return how fast this core is at this moment: passes of an empty loop per microsecond. It takes some 10 ms."""
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(50_000):
            pass
        seconds.append(time.perf_counter() - start)
    return 0.05 / statistics.median(seconds)


def read_texts(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def published(tokenizer):
    """Return tiktoken's encoding with the pattern as others use it."""
    import tiktoken

    return tiktoken.Encoding(
        tokenizer.name,
        pat_str=tokenizer.pattern,
        mergeable_ranks=tokenizer.ranks,
        special_tokens=tokenizer.special_tokens,
    )


def run_tiktoken(path: Path, output: Path, encoding) -> tuple[int, np.ndarray]:
    texts = read_texts(path)
    encode = encoding.encode_to_numpy
    start = clocks()
    tokens = sum(len(encode(text, disallowed_special=())) + 1 for text in texts)
    return tokens, clocks() - start


def run_two(path: Path, output: Path, encoding) -> tuple[int, np.ndarray]:
    """Time what two processes that share nothing make of this machine's cores."""
    texts, encode = read_texts(path), encoding.encode_to_numpy
    context = multiprocessing.get_context("fork")
    counts = context.Array("q", 2)

    def work(index: int) -> None:
        counts[index] = sum(len(encode(text, disallowed_special=())) + 1 for text in texts[index::2])

    start = clocks()
    processes = [context.Process(target=work, args=(index,)) for index in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return sum(counts), clocks() - start


def run_ours(path: Path, output: Path, tokenizer, workers: int, engine: str) -> tuple[int, np.ndarray]:
    from data_pipeline.corpora.sources import open_source
    from data_pipeline.prepare.pipeline import prepare

    tokenizer.engine = engine
    tokenizer.load_engine()
    start = clocks()
    manifest = prepare(
        [open_source(str(path))], output, tokenizer, workers=workers, validation_fraction=0.0, report=lambda line: None
    )
    return manifest.tokens("train"), clocks() - start


_shared = None


def _encode_line(line: str) -> tuple[dict, dict, int]:
    """Return what Megatron-LM's Encoder hands to its parent: ids and lengths by the keys of the record, as lists."""
    ids, lengths = [], []
    encoding, eot = _shared
    sentence = encoding.encode_ordinary(json.loads(line)["text"])
    if len(sentence) > 0:
        ids.extend(sentence)
        lengths.append(len(sentence))
    if len(ids) > 0:
        ids.append(eot)
        lengths[-1] += 1
    return {"text": ids}, {"text": lengths}, len(line)


def run_megatron(path: Path, output: Path, tokenizer) -> tuple[int, np.ndarray]:
    """Time the scheme of `process_json_file` and `IndexedDatasetBuilder.add_document` without checks and messages."""
    from data_pipeline.shards.megatron import token_dtype

    global _shared
    _shared = published(tokenizer), tokenizer.eot_id
    output.mkdir()
    start = clocks()
    dtype, lengths = token_dtype(tokenizer.n_vocab), []
    pool = multiprocessing.get_context("fork").Pool(2)
    with pool, open(path, encoding="utf-8") as lines, open(output / "text_document.bin", "wb") as file:
        for ids, sizes, _ in pool.imap(_encode_line, lines, 32):
            file.write(np.array(ids["text"], dtype).tobytes(order="C"))
            lengths.extend(sizes["text"])
    np.array(lengths, np.int32).tofile(output / "text_document.idx")
    return sum(lengths), clocks() - start


def run_datasets(path: Path, output: Path, tokenizer) -> tuple[int, np.ndarray]:
    """Time the usual recipe, that of nanoGPT's prepare.py: map, then copy into one memory map."""
    import datasets

    datasets.disable_progress_bars()
    encode, eot = published(tokenizer).encode_ordinary, tokenizer.eot_id
    output.mkdir()
    start = clocks()
    data = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(output / "cache"))

    def process(example):
        ids = encode(example["text"])
        ids.append(eot)
        return {"ids": ids, "len": len(ids)}

    mapped = data.map(process, remove_columns=["text"], num_proc=2)
    total = int(np.sum(mapped["len"], dtype=np.uint64))
    tokens = np.memmap(output / "train.bin", dtype=np.int32, mode="w+", shape=(total,))
    position, parts = 0, min(64, len(mapped))
    for index in range(parts):
        batch = mapped.shard(num_shards=parts, index=index, contiguous=True).with_format("numpy")
        ids = np.concatenate(batch["ids"])
        tokens[position : position + len(ids)] = ids
        position += len(ids)
    tokens.flush()
    return total, clocks() - start


def compete(arguments: argparse.Namespace) -> None:
    """Run one competitor in this process, and print tokens and seconds."""
    from data_pipeline.tokenizer.published import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer)
    path, output = Path(arguments.corpus), Path(arguments.corpus).with_name("out")
    shutil.rmtree(output, ignore_errors=True)
    runs = {
        "tiktoken": lambda path, output, tokenizer: run_tiktoken(path, output, published(tokenizer)),
        "pattern": lambda path, output, tokenizer: run_tiktoken(path, output, tokenizer._encoding),
        "pattern2": lambda path, output, tokenizer: run_two(path, output, tokenizer._encoding),
        "ours1": lambda *a: run_ours(*a, 1, "tiktoken"),
        "ours2": lambda *a: run_ours(*a, 2, "tiktoken"),
        "fast1": lambda *a: run_ours(*a, 1, "gigatoken"),
        "fast2": lambda *a: run_ours(*a, 2, "gigatoken"),
        "megatron": run_megatron,
        "datasets": run_datasets,
    }
    tokens, (seconds, cpu) = runs[arguments.only](path, output, tokenizer)
    digest = None
    if arguments.only.startswith(("ours", "fast")):
        digest = json.loads((output / "manifest.json").read_bytes())["content_sha256"]
    shutil.rmtree(output, ignore_errors=True)
    print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu": cpu, "content": digest}))


def make_corpus(path: Path, megabytes: int) -> int:
    """Write Python sources of this environment, without copies, as .jsonl, and return the bytes of text."""
    from data_pipeline.corpora.sources import open_source

    seen, size = set(), 0
    with open(path, "w", encoding="utf-8") as file:
        for text in open_source("installed").documents():
            if text not in seen and "\ufffd" not in text:
                seen.add(text)
                size += len(text.encode())
                file.write(json.dumps({"text": text}) + "\n")
                if size >= megabytes << 20:
                    break
    return size


def prepare_benchmark(arguments: argparse.Namespace) -> None:
    names = [name for name in COMPETITORS if not name.startswith("fast")]
    try:
        import gigatoken  # noqa: F401

        names[5:5] = ["fast1", "fast2"]
    except ImportError:
        print("gigatoken is not installed (the extra `fast`): not measured")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        corpus = Path(folder) / "corpus.jsonl"
        size = make_corpus(corpus, arguments.megabytes)
        progress(f"{size / 1e6:.0f} MB of text are written")
        results: dict[str, list[dict]] = {name: [] for name in names}
        for round_ in rounds(arguments.rounds):
            for name in names if round_ % 2 == 0 else reversed(names):
                command = [sys.executable, __file__, "prepare", "--only", name, "--corpus", str(corpus)]
                found = run_worker(name, [*command, "--tokenizer", arguments.tokenizer])
                results[name].append(found)
                progress(f"{COMPETITORS[name]}: {found['tokens'] / found['seconds'] / 1e6:.2f} M tokens/s")
    print(f"{size / 1e6:.0f} MB of text, tokenizer {arguments.tokenizer}, {arguments.rounds} rounds; medians")
    report_prepare(results)


def report_prepare(results: dict[str, list[dict]]) -> None:
    tokens = {result["tokens"] for found in results.values() for result in found}
    contents = {result["content"] for found in results.values() for result in found} - {None}
    print(f"tokens: {', '.join(f'{t:,}' for t in sorted(tokens))}; our outputs have {len(contents)} content hash(es)")
    for name, found in results.items():
        rate, cpu = (statistics.median(r["tokens"] / r[clock] / 1e6 for r in found) for clock in ("seconds", "cpu"))
        print(f"  {COMPETITORS[name]:<40}{rate:8.2f} M tokens/s {cpu:8.2f} M tokens per CPU second")

    def ratio(a: str, b: str) -> str:
        seconds_a, seconds_b = ([result["seconds"] for result in results[name]] for name in (a, b))
        speed = Spread.of_ratios(seconds_b, seconds_a)
        return f"{speed.median:.2f}x ({speed.range('.2f')})"

    print(f"1 process against tiktoken alone: {ratio('ours1', 'tiktoken')}")
    print(f"1 process against tiktoken alone with our form of its pattern: {ratio('ours1', 'pattern')}")
    print(f"tiktoken alone, our form of its pattern against the published one: {ratio('pattern', 'tiktoken')}")
    print(f"2 processes against 1: {ratio('ours2', 'ours1')}; tiktoken alone: {ratio('pattern2', 'pattern')}")
    for name in ("ours2", "fast2"):
        if name in results:
            print(f"{COMPETITORS[name]} against Megatron-LM's scheme: {ratio(name, 'megatron')}")
            print(f"{COMPETITORS[name]} against datasets.map: {ratio(name, 'datasets')}")


def write_dataset(folder: Path, tokenizer, lengths: np.ndarray, shards: int, holes: bool = False) -> None:
    """Write a dataset of random tokens.

    Args:
        folder: The directory to create.
        tokenizer: What the tokens pretend to come from.
        lengths: Tokens of each document.
        shards: The number of shards.
        holes: Write no tokens, but files that read as zeros and take no room.
    """
    from data_pipeline.shards.manifest import Manifest, Shard
    from data_pipeline.shards.megatron import IndexedWriter, data_path, index_bytes, index_path
    from data_pipeline.shards.writer import shard_of

    folder.mkdir()
    tokenizer.save(folder)
    random, written, dtype = np.random.default_rng(0), [], np.dtype("<u2")
    for index, part in enumerate(np.array_split(lengths, shards)):
        prefix = folder / f"train-{index:05d}"
        if holes:
            index_path(prefix).write_bytes(index_bytes(part, dtype))
            data_path(prefix).touch()
            os.truncate(data_path(prefix), int(part.sum()) * dtype.itemsize)
            written.append(Shard(prefix.name, int(part.sum()), len(part), "", "", 0, None))
            continue
        ids = random.integers(0, 4096, part.sum(), np.uint16)
        ids[np.cumsum(part) - 1] = tokenizer.eot_id
        with IndexedWriter(prefix, dtype) as writer:
            writer.add_documents(ids, part)
        written.append(shard_of(writer))
    description = tokenizer.description()
    manifest = Manifest(description, dtype.name, {"train": written, "validation": []}, [], {}, {}, "")
    (folder / "manifest.json").write_bytes(manifest.to_json())


@dataclass
class EpochPart:
    """What was measured of a tenth of an epoch."""

    rate: float
    """Million tokens per second."""
    core_before: float
    """The loop speed of the core just before it."""
    core_after: float
    """The loop speed of the core just after it."""
    share: float
    """The share of its time that it was on the CPU."""

    def has_whole_core(self, least_speed: float, least_share: float) -> bool:
        return min(self.core_before, self.core_after) >= least_speed and self.share >= least_share


@dataclass
class Epoch:
    """What was measured of an epoch."""

    name: str
    parts: list[EpochPart]
    memory_before: float
    """MiB of memory of the process at the start of the epoch."""
    memory_after: float
    """MiB of memory of the process at the end of the epoch."""


def load_benchmark(arguments: argparse.Namespace) -> None:
    import torch

    from data_pipeline import load_tokenizer, open_dataset

    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cores = [loop_speed() for _ in range(100)]
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        tokenizer = load_tokenizer("builtin")
        large, many = Path(folder) / "large", Path(folder) / "many"
        write_dataset(large, tokenizer, document_lengths(round(arguments.gigabytes * 1e9 / 2 / 800)), 8)
        write_dataset(many, tokenizer, document_lengths(arguments.documents), 128, holes=True)
        progress("both datasets are written")
        epochs = []
        # Micro-batches of about 16,000 tokens.
        for packing, micro_batch_size, options in (
            ("contiguous", 8, {}),
            ("contiguous", 8, {"document_mask": True}),
            ("best_fit", 8, {}),
            ("varlen", 24, {}),
        ):
            dataset = open_dataset(large, packing=packing, seq_len=2048)
            for prefetch in (0, 2):
                name = packing + (", document_mask" if options else "") + (", read ahead" if prefetch else "")
                epochs.append(time_epoch(name, dataset, micro_batch_size, prefetch=prefetch, **options))
                progress(f"{name}: {Spread.of(part.rate for part in epochs[-1].parts):.0f} M tokens/s")
        cores += [part.core_after for epoch in epochs for part in epoch.parts]
        report_epochs(epochs, cores, sum(path.stat().st_size for path in large.glob("*.bin")))
        for packing in ("contiguous", "best_fit", "varlen"):
            seconds = Spread.of(time_first_batch(many, packing) for _ in range(3))
            print(f"  first batch, {arguments.documents:,} documents, {packing}: {seconds:.2f} s", flush=True)


def document_lengths(count: int) -> np.ndarray:
    """Return lengths as of web pages: most are short, a thirteenth are longer than a sample. The mean is near 800."""
    return np.clip(np.random.default_rng(1).lognormal(np.log(485), 1, count), 2, None).astype(np.int32)


def memory_mib() -> float:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize() / 2**20


def time_epoch(name: str, dataset, micro_batch_size: int, **options) -> Epoch:
    """Read a dataset once in random order, in parts that are timed one by one; the options are the loader's."""
    from data_pipeline import BatchLoader

    steps = dataset.samples_per_epoch // micro_batch_size // PARTS
    tokens = dataset.inputs_total * steps * micro_batch_size / dataset.samples_per_epoch
    with BatchLoader(dataset, micro_batch_size=micro_batch_size, **options) as loader:
        for _ in range(20):
            next(loader)
        before, parts, core = memory_mib(), [], loop_speed()
        for _ in range(PARTS):
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                next(loader)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            core_before, core = core, loop_speed()
            parts.append(EpochPart(tokens / seconds / 1e6, core_before, core, cpu / seconds))
        return Epoch(name, parts, before, memory_mib())


def time_first_batch(folder: Path, packing: str) -> float:
    """Return the seconds from opening a dataset to its first batch."""
    from data_pipeline import BatchLoader, open_dataset

    start = time.perf_counter()
    with BatchLoader(open_dataset(folder, packing=packing, seq_len=2048), micro_batch_size=8) as loader:
        next(loader)
    return time.perf_counter() - start


def report_epochs(epochs: list[Epoch], cores: list[float], size: int) -> None:
    """Print the speed of all epochs.

    Args:
        epochs: What was measured.
        cores: The loop speeds of the core that were seen meanwhile.
        size: Bytes of the tokens.
    """
    least_speed, least_share = WHOLE_CORE[0] * max(cores), WHOLE_CORE[1]
    about = (
        f"One core; {size / 1e9:.2f} GB of tokens in documents of about 800, samples of 2048. M tokens/s, without "
        f"padding, over one epoch in random order: median of its {PARTS} parts (slowest to fastest); the same of "
        f"parts with a whole core, which had {least_share:.0%} of its time, and before and after which an empty "
        f"loop made {least_speed:.0f} passes per us or more (of {min(cores):.0f} to {max(cores):.0f} seen); memory "
        "of the process at the start and the end of the epoch, MiB. Then a first batch's time, median of three."
    )
    print(textwrap.fill(about, 110))
    print(f"  {'':<38}{'all parts':<20}{'with a whole core':<27}memory")
    for epoch in epochs:
        rates = f"{Spread.of(part.rate for part in epoch.parts):.0f}"
        whole = [part.rate for part in epoch.parts if part.has_whole_core(least_speed, least_share)]
        with_core = f"{Spread.of(whole):.0f}, {len(whole)} of {PARTS}" if whole else f"none of {PARTS}"
        memory = f"{epoch.memory_before:.0f} to {epoch.memory_after:.0f}"
        print(f"  {epoch.name:<38}{rates:<20}{with_core:<27}{memory}")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "load", "peer", "ray"])
    parser.add_argument("--tokenizer", default="builtin")
    parser.add_argument("--megabytes", type=whole, default=200)
    parser.add_argument("--gigabytes", type=amount, default=1.0)
    parser.add_argument("--documents", type=whole, default=10_000_000)
    parser.add_argument("--rounds", type=whole, default=3)
    parser.add_argument("--directory", help="where to put the corpus and the results (a temporary folder)")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has datatrove")
    parser.add_argument("--only", choices=list(COMPETITORS), help=argparse.SUPPRESS)
    parser.add_argument("--corpus", help=argparse.SUPPRESS)
    add_quick(parser, sys.argv, megabytes=5, gigabytes=0.05, documents=200_000, rounds=1)
    arguments = parser.parse_args()
    if arguments.only:
        compete(arguments)
    else:
        modes = {"prepare": prepare_benchmark, "load": load_benchmark, "peer": peer_benchmark, "ray": ray_benchmark}
        modes[arguments.what](arguments)


if __name__ == "__main__":
    main()
