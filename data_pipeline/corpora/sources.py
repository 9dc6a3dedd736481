"""Documents from named corpora, local and remote files and Hugging Face datasets; see `open_source`."""

import glob
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.corpora.builtin import installed, needles, pystdlib, synthetic
from data_pipeline.corpora.columns import Column
from data_pipeline.corpora.files import File, FoundFiles, all_files, find_files, is_url, local_path, read_unchanged
from data_pipeline.corpora.kinds import KNOWN, LINES_SUFFIXES, SUFFIXES, TEXT_SUFFIXES, is_known, suffixes_of
from data_pipeline.corpora.part import Part, TextSource, fingerprint_of, grouped, part_bytes
from data_pipeline.corpora.records import read_huggingface, read_json, read_jsonl, read_texts, stream_huggingface
from data_pipeline.corpora.saved import is_saved, saved_files
from data_pipeline.corpora.tables import parquet_file, read_arrow, read_parquet
from data_pipeline.printable import first_line, shown
from data_pipeline.secrets import without_secrets
from data_pipeline.stores.attempts import READING, repeat
from data_pipeline.stores.errors import StoreError, answer_may_pass


def open_source(
    spec: str,
    *,
    text_column: str = "text",
    ids_column: str | None = None,
    split: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
) -> TextSource:
    """Return a corpus by name.

    Args:
        spec: `pystdlib` (the running Python's own library without its tests; `synthetic` where it has no sources),
            `installed` (that and every installed package), `synthetic[:documents=N,seed=S]`, `needles[:task=T,...]`
            (texts that hide a fact, with a question and the answer), a file, folder or pattern of files of known kinds
            (`kinds.KNOWN`), local or behind a URL that fsspec knows (s3://, gs://, https://), a folder that Hugging
            Face's `save_to_disk` wrote, or else the name of a Hugging Face dataset, streamed. Local paths come before
            dataset names, except that a directory with `split` or `config_name` is opened as a Hugging Face dataset;
            A/B is not sought on the hub where A is a local directory.
        text_column: The field of records, in files and Hugging Face datasets, that holds the text.
        ids_column: The field that holds lists of token ids; they are read instead of texts.
        split: The split of a Hugging Face dataset, "train" when not given.
        config_name: The configuration of a Hugging Face dataset.
        revision: The revision of a Hugging Face dataset.

    Raises:
        ValueError: Nothing is found, or it cannot be opened.
    """
    column = Column(text_column) if ids_column is None else Column(ids_column, ids=True)
    name, _, parameters = spec.partition(":")
    if name == "synthetic":
        return synthetic(spec, parameters)
    if name == "needles":
        return needles(spec, parameters)
    if spec == "pystdlib":
        return pystdlib(spec)
    if spec == "installed":
        return installed(spec)
    if is_url(spec):
        return _files(spec, column)
    path = local_path(spec)
    if is_saved(path):
        return _saved(spec, path, column, split)
    if path.is_dir() and (split or config_name):
        return _huggingface(spec, str(path.resolve()), column, split, config_name, revision)
    if path.exists() or glob.has_magic(spec):
        return _files(spec, column)
    is_path = spec.startswith((".", "/", "~"))
    if "/" in spec and not is_path and Path(path.parts[0]).is_dir():  # a mistake more often than a name on the hub
        raise ValueError(
            f"{_named(spec)}: no such file or directory in {path.parts[0]!r}; for a Hugging Face dataset of "
            f"that name run where there is no such directory"
        )
    if is_path or suffixes_of(path.name)[0] in (*SUFFIXES, ".csv") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec):
        raise ValueError(f"{_named(spec)}: no such file or directory")
    return _huggingface(spec, spec, column, split, config_name, revision)


def _named(spec: str) -> str:
    """Return what a message calls a source."""
    return f"source {without_secrets(spec)!r}"


# --- files ----------------------------------------------------------------------------------------


def _files(spec: str, column: Column) -> TextSource:
    found = find_files(spec)
    _check_found(spec, found)
    parts: list[Part] = []
    texts: list[File] = []
    for file in found.files:
        if file.suffix in TEXT_SUFFIXES:
            texts.append(file)
        else:
            parts += _text_parts(texts)
            texts = []
            parts += _record_parts(file, column)
    parts += _text_parts(texts)
    count = f"{len(found.files):,} files" if len(found.files) > 1 else "1 file"
    where = f"at {spec}" if is_url(spec) else f"at {Path(spec).expanduser().absolute()}"
    has_records = any(file.suffix not in TEXT_SUFFIXES for file in found.files)
    options = frozenset(["text_column", "ids_column"] if has_records else [])
    return TextSource(spec, "files", f"{count} {where}", parts, str(found.left_out), options)


def _check_found(spec: str, found: FoundFiles) -> None:
    """Check that there are files, and that a single one which was named is of a known kind.

    Raises:
        ValueError: It is not so; the message says what is there.
    """
    for file in found.files:
        if not is_known(file.name):
            raise ValueError(f"{_named(spec)}: {shown(file.path)} is of no known kind; known are {KNOWN}")
    if found.files:
        return
    if found.left_out:
        raise ValueError(
            f"{_named(spec)}: no file there is taken, what is there is left out ({found.left_out}); known are {KNOWN}"
        )
    if is_url(spec) or Path(spec).expanduser().is_dir():
        raise ValueError(f"{_named(spec)}: no file is there; known are {KNOWN}")
    folder = _folder_before_magic(Path(spec).expanduser())
    there = "" if folder.is_dir() else f", there is no folder {str(folder)!r}"
    raise ValueError(f"{_named(spec)}: no such file, the pattern matches nothing{there}")


def _folder_before_magic(pattern: Path) -> Path:
    """Return the folder in which a pattern begins to be one."""
    parts = pattern.parts
    count = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:count])


def _reading(files: list[File], read: Callable[..., Iterator], *arguments: object) -> Callable[[], Iterator]:
    """Return what starts one pass over the records of files, and notices when they are not what was found."""
    return partial(read_unchanged, files, partial(read, *arguments))


def _text_parts(files: list[File]) -> Iterator[Part]:
    for group in grouped(files):
        name = group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else "")
        paths = [file.path for file in group]
        yield Part(name, fingerprint_of(group), sum(file.size for file in group), _reading(group, read_texts, paths))


def _record_parts(file: File, column: Column) -> Iterator[Part]:
    if file.suffix in LINES_SUFFIXES:
        yield from _jsonl_parts(file, part_bytes(file), column)
    elif file.suffix == ".parquet":
        yield from _parquet_parts(file, part_bytes(file), column)
    else:
        read = read_arrow if file.suffix == ".arrow" else read_json
        yield Part(file.name, fingerprint_of([file], column.key), file.size, _reading([file], read, file.path, column))


def _jsonl_parts(file: File, most: int, column: Column) -> Iterator[Part]:
    # Servers of web pages need not answer for a range of bytes.
    if file.is_compressed or file.path.startswith(("http://", "https://")) or file.size <= most:
        read = _reading([file], read_jsonl, file.path, 0, None, column)
        yield Part(file.name, fingerprint_of([file], column.key), file.size, read)
        return
    for start in range(0, file.size, most):
        stop = min(start + most, file.size)
        read = _reading([file], read_jsonl, file.path, start, stop, column)
        yield Part(
            f"{file.name}, bytes {start} to {stop}", fingerprint_of([file], column.key, start, stop), stop - start, read
        )


def _parquet_parts(file: File, most: int, column: Column) -> Iterator[Part]:
    groups: list[list[int] | None] = [None]
    if file.size > 2 * most:  # only then is it worth a look at the file
        with parquet_file(file.path) as parquet:
            each = -(-most * parquet.num_row_groups // file.size)
            groups = [list(range(parquet.num_row_groups))[i : i + each] for i in range(0, parquet.num_row_groups, each)]
    for group in groups:
        name = file.name + (f", row groups {group[0]} to {group[-1]}" if group else "")
        fingerprint = fingerprint_of([file], column.key, group)
        yield Part(
            name, fingerprint, file.size // len(groups), _reading([file], read_parquet, file.path, group, column)
        )


# --- Hugging Face datasets ------------------------------------------------------------------------


def _saved(spec: str, path: Path, column: Column, split: str | None) -> TextSource:
    files, label = saved_files(path, split)
    parts = [part for file in files for part in _record_parts(file, column)]
    return TextSource(spec, "huggingface", label, parts, options=frozenset(["text_column", "ids_column", "split"]))


def _huggingface(
    spec: str, path: str, column: Column, split: str | None, config_name: str | None, revision: str | None
) -> TextSource:
    split = split or "train"
    label = f"Hugging Face dataset {path!r}" + (f" ({config_name})" if config_name else "") + f", split {split!r}"
    label += f", revision {revision}" if revision else ""
    which: dict[str, Any] = {"path": path, "name": config_name, "split": split, "revision": revision}
    not_local = ""
    if Path(path).is_dir():
        if glob.has_magic(path):
            raise ValueError(
                f"{_named(spec)}: Hugging Face's library takes `[`, `*` and `?` in the folder's name for a pattern; "
                f"rename the folder, or leave out --split and --name"
            )
        content: Any = [[file.path, file.size, file.version] for file in all_files(Path(path))]
    else:
        which["revision"] = content = _resolved(path, revision)
        not_local = "is no built-in corpus (pystdlib, installed, synthetic), no local file, and "
    try:
        dataset = stream_huggingface(which)
    except Exception as error:  # the library raises many kinds, some of them bare Exception subclasses
        raise ValueError(f"{_named(spec)} {not_local}cannot be opened as {label}: {first_line(error)}") from error
    if dataset.column_names is not None:
        column.check_names(dataset.column_names, label)
    count = dataset.num_shards
    parts = [
        Part(
            f"{path} {split} {index + 1} of {count}",
            json.dumps([which, content, column.key, index, count], sort_keys=True),
            0,
            partial(read_huggingface, which, label, column, index, count),
        )
        for index in range(count)
    ]
    options = frozenset(["text_column", "ids_column", "split", "config_name", "revision"])
    return TextSource(spec, "huggingface", label, parts, options=options)


def _resolved(path: str, revision: str | None) -> str | None:
    """Return the commit that a revision is now, so that a dataset that changes is not mixed with its older state.

    Without a network it is the revision itself: what is in the cache will be read.

    Raises:
        ValueError: The hub is there, and cannot tell at the moment.
    """
    import huggingface_hub

    def look() -> str | None:
        try:
            return huggingface_hub.HfApi().dataset_info(path, revision=revision, timeout=20).sha
        except Exception as error:
            if answer_may_pass(error):  # many machines that ask at once are told to come back
                raise
            return revision

    url = f"hf://datasets/{path}"
    try:
        return repeat(url, look, READING)
    except StoreError as error:
        raise ValueError(f"{shown(url)}: the hub does not say which commit it is now: {error}") from error
