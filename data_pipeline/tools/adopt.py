r"""Write a manifest for token files that are there already.

    python -m data_pipeline.adopt data/openwebtext --tokenizer gpt2 --dtype uint16 \\
        --train train.bin --validation val.bin
    python -m data_pipeline.adopt data/pile --tokenizer o200k_harmony --train 'pile_*_text_document'

    python -m data_pipeline.adopt data/saved --tokenizer gpt2 --train train --validation test

The first is nanoGPT's, the second Megatron-LM's, the third a folder of Hugging Face's `save_to_disk` with a column of
token ids. Everything is read once; nothing that is there is changed.
"""

import contextlib
import glob
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.command_line import MISTAKE, Program, option, positional, print_line, ranged, run
from data_pipeline.disk import staging_directory, sync_path, write_file_atomically
from data_pipeline.printable import shown
from data_pipeline.shards.checksums import record_content, scan, token_problems
from data_pipeline.shards.manifest import FILE_NAME, Manifest, Shard
from data_pipeline.shards.megatron import IndexedReader, index_path, token_dtype
from data_pipeline.shards.raw import DTYPES, RawReader, npy_header
from data_pipeline.tokenizer.published import load_tokenizer
from data_pipeline.tokenizer.tokenizer import Tokenizer
from data_pipeline.tools.adopt_tables import copy_ids, is_table, tables_in


def adopt(
    directory: str | Path,
    tokenizer: Tokenizer,
    *,
    train: list[str],
    validation: list[str] = [],  # noqa: B006 (never changed)
    dtype: str | None = None,
    ids_column: str | None = None,
    workers: int = 1,
    report: Callable[[str], None] = print,
) -> Manifest:
    """Write manifest.json and the tokenizer beside existing token files, which are read once.

    Of tables the ids are copied to shards beside them.

    Args:
        directory: Where the files are.
        tokenizer: What made them.
        train: Patterns of names in `directory`. The files of a split are in the order of the patterns, and of the names
            within one. Files with an .idx beside them are Megatron's (they need no suffix), .arrow and .parquet files
            are tables, as are folders that `save_to_disk` wrote; all others are raw.
        validation: Patterns like those of `train`.
        dtype: The type of raw files, "uint16", "uint32" or "int32"; Megatron's indices and the headers of numpy.save
            know theirs.
        ids_column: The column of tables that holds the ids, "input_ids" when not given.
        workers: How many files are read at a time.
        report: Takes lines for people.

    Returns:
        The manifest.

    Raises:
        ValueError: There is a manifest or another tokenizer already, a pattern matches nothing, a file makes no sense
            as `dtype` or has ids beyond the vocabulary, documents of a Megatron file do not end with the end-of-text
            token, or there is nothing to train on; or another process is adopting them. The message is one line with
            the file and the remedy, and nothing was written.
    """
    directory = Path(directory)
    with _alone_in(directory) as staging:
        manifest = _adopt_files(directory, staging, tokenizer, train, validation, dtype, ids_column, workers)
    _report(directory, manifest, report)
    return manifest


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[Path]:
    """Be the one process that adopts files of a folder, and give a folder in it for what is not yet whole."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: no directory; name the one that holds the token files")
    with contextlib.ExitStack() as held:
        try:
            staging = held.enter_context(staging_directory(directory / "adopted"))
        except ValueError:
            raise ValueError(f"{directory}: another process is adopting these files; wait until it has ended") from None
        yield staging


def _adopt_files(
    directory: Path,
    staging: Path,
    tokenizer: Tokenizer,
    train: list[str],
    validation: list[str],
    dtype: str | None,
    ids_column: str | None,
    workers: int,
) -> Manifest:
    has_tokenizer = _check_directory(directory, tokenizer)
    names = {"train": _matching_names(directory, train), "validation": _matching_names(directory, validation)}
    if twice := sorted(set(names["train"]) & set(names["validation"])):
        raise ValueError(f"{directory / twice[0]}: in both splits; training and validation need different files")
    described = tokenizer.description()
    if any(is_table(Path(name)) for listed in names.values() for name in listed):
        _check_tables(directory, names, dtype)
        tables = {split: [directory / name for name in listed] for split, listed in names.items()}
        splits = copy_ids(directory, staging, tables, ids_column or "input_ids", tokenizer)
        storage, dtype = "megatron", token_dtype(tokenizer.n_vocab).name
    else:
        if ids_column is not None:
            raise ValueError(f"--ids-column {ids_column}: is about tables, and these are files of ids; leave it out")
        readers = {name: _open(directory / name, dtype, tokenizer) for name in names["train"] + names["validation"]}
        storage, dtype = _common_format(directory, readers)
        shards = _read_shards(readers, described, workers)
        splits = {split: [shards[name] for name in names[split]] for split in names}
        if not any(shard.tokens for shard in splits["train"]):
            listed = ", ".join([*names["train"][:3], *["..."] * (len(names["train"]) > 3)])
            raise ValueError(f"{directory}: no token for training in {listed}; name other files with --train")
    manifest = Manifest(
        tokenizer=described,
        dtype=dtype,
        splits=splits,
        sources=[{"source": shown(pattern), "kind": "adopted"} for pattern in [*train, *validation]],
        dropped={},
        irregular={},
        python_version=platform.python_version(),
        storage=storage,
    )
    if not has_tokenizer:
        tokenizer.save(directory)
    write_file_atomically(directory / FILE_NAME, manifest.to_json())
    sync_path(directory)
    record_content(directory, manifest)
    return manifest


def _check_tables(directory: Path, names: dict[str, list[str]], dtype: str | None) -> None:
    """Check that all files are tables, where one is.

    Raises:
        ValueError: They are not, or a dtype is given.
    """
    for name in (name for listed in names.values() for name in listed):
        if not is_table(Path(name)):
            raise ValueError(f"{directory / name}: no table where others are; adopt them apart")
    if dtype is not None:
        raise ValueError(f"--dtype {dtype}: is about raw files, and these are tables; leave it out")


def _check_directory(directory: Path, tokenizer: Tokenizer) -> bool:
    """Return whether `tokenizer` is in the directory already.

    Raises:
        ValueError: A manifest or another tokenizer is there, or the directory is not.
    """
    if (directory / FILE_NAME).exists():
        raise ValueError(f"{directory / FILE_NAME}: exists; move it away first if these files are to be adopted anew")
    # Never half written: the manifest comes last, and a tokenizer alone is no dataset.
    found = [name for name in ("tokenizer.gptoss.json", "tokenizer.tiktoken") if (directory / name).exists()]
    if found and Tokenizer.load(directory).sha256 != tokenizer.sha256:
        raise ValueError(
            f"{directory / found[0]}: another tokenizer; move it away, or adopt with --tokenizer {directory}"
        )
    return bool(found)


def _matching_names(directory: Path, patterns: list[str]) -> list[str]:
    """Return the names of the shards that match, each once: of raw files with their suffix, of Megatron's without."""
    names: dict[str, None] = {}
    for pattern in patterns:
        if Path(pattern).name != pattern:
            raise ValueError(f"{pattern!r}: must name files in {directory} itself, without a slash")
        # A file may have `[1]` in its name.
        exact = (directory / pattern).exists() or index_path(directory / pattern).exists()
        matching = glob.escape(pattern) if exact else pattern
        try:
            found = sorted(directory.glob(matching))
        except (ValueError, IndexError, NotImplementedError) as error:
            raise ValueError(f"{pattern!r}: is no pattern of names in {directory}: {error}") from error
        files = [path for path in found if path.is_file() and path.suffix != ".idx"]
        prefixes = [path.name.removesuffix(".bin") for path in files]
        found_names = [
            prefix if index_path(path.with_name(prefix)).exists() else path.name
            for path, prefix in zip(files, prefixes)
        ]
        found_names += [path.name.removesuffix(".idx") for path in sorted(directory.glob(f"{matching}.idx"))]
        found_names += [str(table.relative_to(directory.absolute())) for path in found for table in tables_in(path)]
        if not found_names:
            raise ValueError(f"{directory / pattern}: matches no file; give names or patterns of files in {directory}")
        names |= dict.fromkeys(found_names)
    return list(names)


def _open(path: Path, dtype: str | None, tokenizer: Tokenizer) -> IndexedReader | RawReader:
    if index_path(path).exists():
        indexed = IndexedReader(path)
        if dtype not in (None, indexed.dtype.name):
            raise ValueError(f"{index_path(path)}: says {indexed.dtype.name}, not {dtype}; leave out --dtype")
        indexed.check()
        return indexed
    header = npy_header(path)
    if (dtype := dtype or (header and header[1])) is None:
        raise ValueError(f"{path}: does not say its dtype; give --dtype, one of {', '.join(DTYPES)} (nanoGPT: uint16)")
    reader = RawReader(path, dtype, eot_id=tokenizer.eot_id, n_vocab=tokenizer.n_vocab)
    reader.check()
    return reader


def _common_format(directory: Path, readers: dict[str, IndexedReader | RawReader]) -> tuple[str, str]:
    """Return the storage, "raw" or "megatron", and the dtype of all files.

    Raises:
        ValueError: They differ.
    """
    formats = {
        ("raw" if isinstance(reader, RawReader) else "megatron", reader.dtype.name): name
        for name, reader in readers.items()
    }
    if len(formats) > 1:
        (first, first_name), (second, second_name) = list(formats.items())[:2]
        raise ValueError(
            f"{directory / second_name}: {' '.join(second)} where {first_name} is {' '.join(first)}; adopt them "
            f"apart, in directories of their own"
        )
    (common,) = formats
    return common


def _read_shards(readers: dict[str, IndexedReader | RawReader], tokenizer: dict, workers: int) -> dict[str, Shard]:
    """Return the shards by name after reading all tokens, `workers` files at a time."""
    with ThreadPoolExecutor(workers) as pool:  # hashing does not hold the GIL
        try:
            return dict(zip(readers, pool.map(lambda name: _read_shard(name, readers[name], tokenizer), readers)))
        finally:  # at the first error the other files need not be read
            pool.shutdown(cancel_futures=True)


def _read_shard(name: str, reader: IndexedReader | RawReader, tokenizer: dict) -> Shard:
    found = scan(reader, tokenizer["eot_id"])
    for problem in token_problems(reader, found, tokenizer):
        raise ValueError(problem)
    index_sha256 = reader.index_sha256() if isinstance(reader, IndexedReader) else None
    return Shard(name, reader.n_tokens, found.documents, found.sha256, index_sha256, found.max_token)


def _report(directory: Path, manifest: Manifest, report: Callable[[str], None]) -> None:
    for split, listed in manifest.splits.items():
        report(
            f"{directory}: {split} {manifest.tokens(split):,} tokens in {manifest.documents(split):,} documents, "
            f"{len(listed)} files of {manifest.dtype}"
        )
    eot_id = manifest.tokenizer["eot_id"]
    for shard in (shard for listed in manifest.splits.values() for shard in listed):
        if shard.documents == 1:
            report(f"warning: {directory / shard.name}: one document, no end-of-text (id {eot_id}) inside")


@dataclass
class AdoptOptions:
    """Write the manifest of token files that exist: raw ones (nanoGPT, OLMo) or Megatron's."""

    directory: str = positional("DIR")
    """Where the files are, and where the manifest goes."""
    tokenizer: str = option()
    """What made the tokens: a name as for prepare, or a path."""
    train: list[str] = option(metavar="NAME", several=True)
    """Files in DIR, or patterns of names; also the folder of a split that save_to_disk wrote. May be repeated."""
    validation: list[str] = option(default_factory=list, metavar="NAME", several=True)
    """Likewise."""
    pattern: str | None = None
    """Word pattern of a tokenizer file that is not recognised."""
    vocab_file: str | None = None
    """Rank file of an OpenAI tokenizer, instead of searching for it."""
    dtype: Literal["uint16", "uint32", "int32"] | None = None
    """Type of raw files, little endian."""
    ids_column: str | None = None
    """Column of tables that holds token ids; null is input_ids."""
    workers: int = ranged(default_factory=lambda: len(os.sched_getaffinity(0)), at_least=1)
    """Files read at a time."""


def main(argv: list[str] | None = None) -> int:
    """Adopt what the command line names; return the exit code."""
    return run(Program("python -m data_pipeline.adopt", failed=MISTAKE), AdoptOptions, _adopt, argv)


def _adopt(options: AdoptOptions) -> None:
    tokenizer = load_tokenizer(options.tokenizer, pattern=options.pattern, vocab_file=options.vocab_file)
    adopt(
        options.directory,
        tokenizer,
        train=options.train,
        validation=options.validation,
        dtype=options.dtype,
        ids_column=options.ids_column,
        workers=options.workers,
        report=print_line,
    )
