"""Text into a prepared dataset: a directory of Megatron shards, a manifest and the tokenizer.

    python -m data_pipeline.prepare pystdlib --output data/pystdlib
    python -m data_pipeline.prepare corpus/*.jsonl.zst --output data/corpus --tokenizer o200k_harmony --workers 8

The directory appears whole or not at all, and its bytes do not depend on the number of workers.
"""

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.indexed import IndexedWriter, token_dtype
from data_pipeline.manifest import FILE_NAME, SPLITS, VERSION, Manifest, Shard, open_shards
from data_pipeline.sources import Source, open_source
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from data_pipeline.vocabulary import write_file_atomically

SETTINGS_FILE_NAME = (
    "prepare.json"  # what was asked for, to recognise the same request; it may name local files, the manifest does not
)
_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 4096
_REPORT_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class _Batch:
    splits: list[str]
    texts: list[str]


@dataclass(frozen=True)
class _Encoded:
    """tokens: all documents of a batch, each with its end-of-text, one after the other; lengths: of each document."""

    tokens: np.ndarray
    lengths: list[int]
    irregular: Counter


def prepare(
    sources: list[Source],
    output: str | Path,
    tokenizer: Tokenizer,
    *,
    validation_fraction: float = 0.01,
    shard_tokens: int = 1 << 26,
    max_documents: int | None = None,
    workers: int = 1,
    overwrite: bool = False,
    report: Callable[[str], None] = print,
) -> Manifest:
    """Writes the documents of `sources`, in order, as a dataset in the directory `output`, and returns its manifest.

    Exact duplicates and empty documents are dropped. A document's SHA-256 alone decides its split, so no text is in
    both. Each document ends with the tokenizer's end-of-text token. A shard holds whole documents, up to `shard_tokens`
    tokens (more only for a single longer document).
    workers: processes that tokenize. When `output` already holds the result of the same request nothing is done.

    Raises ValueError for a bad argument, a bad record, no training text, or an `output` that holds something else and
    `overwrite` is not set (with `overwrite` only a prepared dataset is replaced); OSError when it cannot be written.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction {validation_fraction}: must be at least 0 and less than 1")
    for name, value in (("workers", workers), ("shard_tokens", shard_tokens), ("max_documents", max_documents)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: must be at least 1")
    output = Path(output).absolute()
    settings = {
        "version": VERSION,
        "sources": [[source.spec, source.fingerprint] for source in sources],
        "tokenizer_sha256": tokenizer.sha256,
        "validation_fraction": validation_fraction,
        "shard_tokens": shard_tokens,
        "max_documents": max_documents,
    }
    if (existing := _existing(output, settings, overwrite)) is not None:
        report(f"{output}: already prepared, {_summary(existing)}")
        return existing
    for source in sources:
        report(f"{source.spec}: {source.description}")

    with _staging_directory(output) as staging:
        tokenizer.save(staging)
        dropped: Counter[str] = Counter(empty=0, duplicate=0)
        documents = (text for source in sources for text in source.documents())
        distinct = itertools.islice(_distinct(documents, dropped), max_documents)
        batches = _batches(distinct, validation_fraction)
        with _encoder(staging, tokenizer, workers) as encode:
            splits, irregular = _write_shards(staging, encode(batches), tokenizer, shard_tokens, report)
        manifest = Manifest(
            tokenizer={
                "name": tokenizer.name,
                "sha256": tokenizer.sha256,
                "n_vocab": tokenizer.n_vocab,
                "eot_id": tokenizer.eot_id,
            },
            dtype=token_dtype(tokenizer.n_vocab).name,
            splits=splits,
            sources=[{"source": source.spec, "kind": source.kind} for source in sources],
            dropped=dict(dropped),
            irregular={reason: irregular[reason] for reason in ("split", "repaired")},
            python_version=platform.python_version(),
        )
        if not splits["train"]:
            raise ValueError("there is no training text in the sources, so nothing was prepared")
        write_file_atomically(staging / SETTINGS_FILE_NAME, (json.dumps(settings, indent=1) + "\n").encode())
        write_file_atomically(staging / FILE_NAME, manifest.to_json())
        _publish(staging, output, overwrite)
    report(f"{output}: {_summary(manifest)}")
    if validation_fraction and not splits["validation"]:
        report(
            "warning: no document fell into the validation split; prepare again with --validation-fraction 0.2 "
            "--overwrite, say, or train with --validation.every 0"
        )
    return manifest


def _existing(output: Path, settings: dict, overwrite: bool) -> Manifest | None:
    """The dataset already at `output` if it answers the same request; None if it may be written. ValueError if it must
    not be.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / FILE_NAME).is_file():
        raise ValueError(f"{output}: exists and is not a prepared dataset; choose another output directory")
    try:
        found = json.loads((output / SETTINGS_FILE_NAME).read_bytes())
        manifest = Manifest.read(output)
        for split in manifest.splits:
            open_shards(output, manifest, split)
        differing = sorted(key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key))
        problem = f"was prepared with other settings ({', '.join(differing)} differ)" if differing else None
    except (OSError, ValueError, AttributeError) as error:
        problem = f"holds a damaged dataset ({error})"
    if problem is None:
        return manifest
    if not overwrite:
        raise ValueError(f"{output}: {problem}; choose another output directory, or replace it with --overwrite")
    return None


@contextlib.contextmanager
def _staging_directory(output: Path) -> Iterator[Path]:
    """OUTPUT.tmp-*, removed unless it was renamed. It is locked while in use, so that what killed runs left behind can
    be told and swept.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    for leftover in output.parent.glob(f"{output.name}.tmp-*"):
        with contextlib.suppress(OSError), _locked(leftover):
            shutil.rmtree(leftover)
    staging = Path(tempfile.mkdtemp(dir=output.parent, prefix=f"{output.name}.tmp-"))
    try:
        staging.chmod(0o755)
        with _locked(staging):
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _publish(staging: Path, output: Path, overwrite: bool) -> None:
    _sync_directory(staging)
    replaced = None
    if overwrite and output.exists():
        replaced = Path(tempfile.mkdtemp(dir=output.parent, prefix=f"{output.name}.tmp-"))
        os.rename(output, replaced / "replaced")
    os.rename(staging, output)
    _sync_directory(output.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _distinct(documents: Iterable[str], dropped: Counter) -> Iterator[tuple[str, bytes]]:
    """(text, SHA-256) of each document that is neither empty nor an exact copy of an earlier one. Keeps about 100 bytes
    per document.
    """
    seen: set[bytes] = set()
    for text in documents:
        if not text:
            dropped["empty"] += 1
            continue
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        if digest[:16] in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(digest[:16])
        yield text, digest


def _batches(documents: Iterable[tuple[str, bytes]], validation_fraction: float) -> Iterator[_Batch]:
    batch, characters = _Batch([], []), 0
    for text, digest in documents:
        fraction = int.from_bytes(digest[:8], "big") / 2**64
        batch.splits.append("validation" if fraction < validation_fraction else "train")
        batch.texts.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch.texts) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = _Batch([], []), 0
    if batch.texts:
        yield batch


def _encode(tokenizer: Tokenizer, texts: list[str]) -> _Encoded:
    irregular_before = tokenizer.irregular.copy()
    end = np.array([tokenizer.eot_id], dtype=np.int32)
    parts, lengths = [], []
    for text in texts:
        tokens = tokenizer.encode(text)
        parts += (tokens, end)
        lengths.append(len(tokens) + 1)
    dtype = token_dtype(tokenizer.n_vocab)
    return _Encoded(np.concatenate(parts).astype(dtype), lengths, tokenizer.irregular - irregular_before)


_worker_tokenizer: Tokenizer | None = None


def _start_worker(directory: Path) -> None:
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    _worker_tokenizer = Tokenizer.load(directory)


def _encode_in_worker(texts: list[str]) -> _Encoded:
    assert _worker_tokenizer is not None
    return _encode(_worker_tokenizer, texts)


@contextlib.contextmanager
def _encoder(staging: Path, tokenizer: Tokenizer, workers: int) -> Iterator[Callable]:
    """A function from batches to (batch, encoded) in the same order. In this process for one worker, else in a pool
    that reads ahead a little.
    """
    if workers == 1:
        yield lambda batches: ((batch, _encode(tokenizer, batch.texts)) for batch in batches)
        return

    # Not fork: pyarrow and datasets run threads here. Not multiprocessing.Pool: it waits for ever when a worker is
    # killed.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(staging,))

    def encode(batches: Iterable[_Batch]) -> Iterator[tuple[_Batch, _Encoded]]:
        pending: deque = deque()
        for batch in batches:
            try:
                pending.append((batch, pool.submit(_encode_in_worker, batch.texts)))
            except Exception as error:  # a pool that is just breaking fails in several ways, by its own closed pipes
                raise BrokenProcessPool(str(error)) from error
            if len(pending) > 2 * workers:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()

    try:
        yield encode
    except BrokenProcessPool as error:
        raise ValueError("a tokenizing process died (out of memory?); try fewer workers") from error
    finally:
        with contextlib.suppress(OSError):  # the same pipe
            pool.shutdown(cancel_futures=True)


class _SplitWriter:
    """Cuts one split into shards SPLIT-00000, SPLIT-00001, ..."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype, shard_tokens: int):
        self.directory, self.split, self.dtype, self.shard_tokens = directory, split, dtype, shard_tokens
        self.shards: list[Shard] = []
        self._writer: IndexedWriter | None = None

    def add(self, tokens: np.ndarray) -> None:
        if self._writer is not None and self._writer.tokens + len(tokens) > self.shard_tokens:
            self.close()
        if self._writer is None:
            self._writer = IndexedWriter(self.directory / f"{self.split}-{len(self.shards):05d}", self.dtype)
        self._writer.add_document(tokens)

    def close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()
            name, index_sha256, max_token = writer.prefix.name, writer.index_sha256, writer.max_token
            self.shards.append(Shard(name, writer.tokens, writer.documents, writer.sha256, index_sha256, max_token))


def _write_shards(
    directory: Path,
    batches: Iterable[tuple[_Batch, _Encoded]],
    tokenizer: Tokenizer,
    shard_tokens: int,
    report: Callable[[str], None],
) -> tuple[dict[str, list[Shard]], Counter]:
    dtype = token_dtype(tokenizer.n_vocab)
    writers = {split: _SplitWriter(directory, split, dtype, shard_tokens) for split in SPLITS}
    irregular: Counter[str] = Counter()
    start = reported = time.monotonic()
    n_documents = n_tokens = 0
    for batch, encoded in batches:
        position = 0
        for split, length in zip(batch.splits, encoded.lengths):
            writers[split].add(encoded.tokens[position : position + length])
            position += length
        irregular += encoded.irregular
        n_documents, n_tokens = n_documents + len(batch.texts), n_tokens + position
        if (now := time.monotonic()) - reported >= _REPORT_EVERY_SECONDS:
            reported = now
            rate = n_tokens / (now - start)
            report(f"  {n_documents:,} documents, {n_tokens / 1e6:,.1f} M tokens, {rate / 1e6:.2f} M tokens/s")
    for writer in writers.values():
        writer.close()
    return {split: writer.shards for split, writer in writers.items()}, irregular


def _summary(manifest: Manifest) -> str:
    parts = [
        f"{split} {manifest.tokens(split):,} tokens in {manifest.documents(split):,} documents"
        for split in manifest.splits
    ]
    left_out = [f"{count:,} {reason}" for reason, count in manifest.dropped.items() if count]
    treated = [f"{count:,} {reason}" for reason, count in manifest.irregular.items() if count]
    tokenizer = manifest.tokenizer
    return (
        ", ".join(parts)
        + (f"; dropped {', '.join(left_out)}" if left_out else "")
        + (f"; {', '.join(treated)} by the tokenizer" if treated else "")
        + f"; tokenizer {tokenizer['name']}, a model needs vocab_size >= {tokenizer['n_vocab']} "
        f"(end of text is {tokenizer['eot_id']})"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.prepare",
        description="Tokenize text into a directory that training reads.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="pystdlib, installed, synthetic[:documents=N,seed=S]; files, globs or directories of .txt .md .jsonl "
        ".parquet (.gz .zst); or a Hugging Face dataset name",
    )
    parser.add_argument("--output", required=True, help="directory to create")
    parser.add_argument(
        "--tokenizer", default="builtin", help="builtin, bytes, o200k_harmony, o200k_base, cl100k_base, gpt2, or a path"
    )
    parser.add_argument("--pattern", help="word pattern of a tokenizer file that is not recognised")
    parser.add_argument("--vocab-file", help="rank file of an OpenAI tokenizer, instead of searching for it")
    parser.add_argument("--vocab-size", type=int, help="shorten the tokenizer to exactly this many ids")
    parser.add_argument("--text-column", default="text", help="field that holds the text in records")
    parser.add_argument("--split", help="split of a Hugging Face dataset (train when not given)")
    parser.add_argument("--name", help="configuration of a Hugging Face dataset")
    parser.add_argument(
        "--validation-fraction", type=float, default=0.01, help="share of the documents held out (0.01)"
    )
    parser.add_argument("--shard-tokens", type=int, default=1 << 26, help="tokens per shard file (67108864)")
    parser.add_argument("--max-documents", type=int, help="stop after this many documents")
    parser.add_argument("--workers", type=int, default=1, help="tokenizing processes")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    arguments = parser.parse_args(argv)
    try:
        tokenizer = load_tokenizer(
            arguments.tokenizer,
            pattern=arguments.pattern,
            vocab_file=arguments.vocab_file,
            vocab_size=arguments.vocab_size,
        )
        sources = [
            open_source(spec, text_column=arguments.text_column, split=arguments.split, config_name=arguments.name)
            for spec in arguments.sources
        ]
        prepare(
            sources,
            arguments.output,
            tokenizer,
            validation_fraction=arguments.validation_fraction,
            shard_tokens=arguments.shard_tokens,
            max_documents=arguments.max_documents,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            report=lambda line: print(line, flush=True),
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
