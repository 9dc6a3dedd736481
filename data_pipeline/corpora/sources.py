"""Documents from named corpora, local and remote files and Hugging Face datasets; see `open_source`."""

import glob
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.corpora.builtin import installed, pystdlib, synthetic
from data_pipeline.corpora.files import File, content_suffix, find_files, first_line, is_url
from data_pipeline.corpora.part import Part, TextSource, fingerprint_of, grouped, part_bytes
from data_pipeline.corpora.records import (
    no_such_column,
    parquet_file,
    read_huggingface,
    read_jsonl,
    read_parquet,
    read_texts,
    stream_huggingface,
)

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")


def open_source(
    spec: str,
    *,
    text_column: str = "text",
    split: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
) -> TextSource:
    """Return a corpus by name.

    Args:
        spec: `pystdlib` (the running Python's own library without its tests; `synthetic` where it has no sources),
            `installed` (that and every installed package), `synthetic[:documents=N,seed=S]`, a file, glob or directory
            of .txt, .md, .jsonl and .parquet (all but parquet also .gz or .zst), local or behind a URL that fsspec
            knows (s3://, gs://, https://), or else the name of a Hugging Face dataset, streamed. Local paths come
            before dataset names, except that a directory with `split` or `config_name` is opened as a Hugging Face
            dataset; A/B is not sought on the hub where A is a local directory.
        text_column: The field of .jsonl, .parquet and Hugging Face records that holds the text.
        split: The split of a Hugging Face dataset, "train" when not given.
        config_name: The configuration of a Hugging Face dataset.
        revision: The revision of a Hugging Face dataset.

    Raises:
        ValueError: Nothing is found, or it cannot be opened.
    """
    name, _, parameters = spec.partition(":")
    if name == "synthetic":
        return synthetic(spec, parameters)
    if spec == "pystdlib":
        return pystdlib(spec)
    if spec == "installed":
        return installed(spec)
    if is_url(spec):
        return _files(spec, text_column)
    path = Path(spec).expanduser()
    if path.is_dir() and (split or config_name):
        return _huggingface(spec, str(path.resolve()), text_column, split, config_name, revision)
    if path.exists() or glob.has_magic(spec):
        return _files(spec, text_column)
    if "/" in spec and Path(path.parts[0]).is_dir():  # a mistake more often than a name on the hub
        raise ValueError(
            f"source {spec!r}: no such file or directory in {path.parts[0]!r}; for a Hugging Face dataset of that name "
            f"run where there is no such directory"
        )
    looks_like_path = spec.startswith((".", "/", "~")) or content_suffix(path.name) in (*SUFFIXES, ".json", ".csv")
    if looks_like_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec):
        raise ValueError(f"source {spec!r}: no such file or directory")
    return _huggingface(spec, spec, text_column, split, config_name, revision)


# --- files ----------------------------------------------------------------------------------------


def _files(spec: str, text_column: str) -> TextSource:
    files = find_files(spec, SUFFIXES)
    kinds = ", ".join(SUFFIXES)
    if not files:
        raise ValueError(f"source {spec!r}: no file there ends in one of {kinds} (or these with .gz or .zst)")
    for file in files:
        if file.suffix not in SUFFIXES or (file.is_compressed and file.suffix == ".parquet"):
            raise ValueError(
                f"source {spec!r}: {file.path} is of no known kind; known are {kinds}, all but .parquet also "
                f"with .gz or .zst"
            )
    parts: list[Part] = []
    texts: list[File] = []
    for file in files:
        if file.suffix in TEXT_SUFFIXES:
            texts.append(file)
            continue
        parts += _text_parts(texts)
        texts = []
        cut = _parquet_parts if file.suffix == ".parquet" else _jsonl_parts
        parts += cut(file, part_bytes(file), text_column)
    parts += _text_parts(texts)
    count = f"{len(files)} files" if len(files) > 1 else "1 file"
    where = f"at {spec}" if is_url(spec) else f"at {Path(spec).expanduser().absolute()}"
    return TextSource(spec, "files", f"{count} {where}", parts)


def _text_parts(files: list[File]) -> Iterator[Part]:
    for group in grouped(files):
        name = group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else "")
        paths = [file.path for file in group]
        yield Part(name, fingerprint_of(group), sum(file.size for file in group), partial(read_texts, paths))


def _jsonl_parts(file: File, most: int, column: str) -> Iterator[Part]:
    # Servers of web pages need not answer for a range of bytes.
    if file.is_compressed or file.path.startswith(("http://", "https://")) or file.size <= most:
        yield Part(
            file.name, fingerprint_of([file], column), file.size, partial(read_jsonl, file.path, 0, None, column)
        )
        return
    for start in range(0, file.size, most):
        stop = min(start + most, file.size)
        read = partial(read_jsonl, file.path, start, stop, column)
        yield Part(
            f"{file.name}, bytes {start} to {stop}", fingerprint_of([file], column, start, stop), stop - start, read
        )


def _parquet_parts(file: File, most: int, column: str) -> Iterator[Part]:
    groups: list[list[int] | None] = [None]
    if file.size > 2 * most:  # only then is it worth a look at the file
        with parquet_file(file.path) as parquet:
            each = -(-most * parquet.num_row_groups // file.size)
            groups = [list(range(parquet.num_row_groups))[i : i + each] for i in range(0, parquet.num_row_groups, each)]
    for group in groups:
        name = file.name + (f", row groups {group[0]} to {group[-1]}" if group else "")
        fingerprint = fingerprint_of([file], column, group)
        yield Part(name, fingerprint, file.size // len(groups), partial(read_parquet, file.path, group, column))


# --- Hugging Face datasets ------------------------------------------------------------------------


def _huggingface(
    spec: str, path: str, column: str, split: str | None, config_name: str | None, revision: str | None
) -> TextSource:
    split = split or "train"
    label = f"Hugging Face dataset {path!r}" + (f" ({config_name})" if config_name else "") + f", split {split!r}"
    label += f", revision {revision}" if revision else ""
    which: dict[str, Any] = {"path": path, "name": config_name, "split": split, "revision": revision}
    not_local = ""
    if Path(path).is_dir():
        content: Any = [[file.path, file.size, file.version] for file in find_files(path, None)]
    else:
        which["revision"] = content = _resolved(path, revision)
        not_local = "is no built-in corpus (pystdlib, installed, synthetic), no local file, and "
    try:
        dataset = stream_huggingface(which)
    except Exception as error:  # the library raises many kinds, some of them bare Exception subclasses
        raise ValueError(f"source {spec!r} {not_local}cannot be opened as {label}: {first_line(error)}") from error
    names = dataset.column_names
    if names is not None and column not in names:
        raise ValueError(f"{label}: {no_such_column(column, names)}")
    count = dataset.num_shards
    parts = [
        Part(
            f"{path} {split} {index + 1} of {count}",
            json.dumps([which, content, column, index, count], sort_keys=True),
            0,
            partial(read_huggingface, which, label, column, index, count),
        )
        for index in range(count)
    ]
    return TextSource(spec, "huggingface", label, parts)


def _resolved(path: str, revision: str | None) -> str | None:
    """Return the commit that a revision is now, so that a dataset that changes is not mixed with its older state."""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(path, revision=revision, timeout=20).sha
    except Exception:  # without a network, what is in the cache will be read
        return revision
