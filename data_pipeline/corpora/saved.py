"""Folders that Hugging Face's `save_to_disk` wrote: which Arrow files a dataset consists of.

DIR/dataset_info.json, DIR/state.json, DIR/data-00000-of-00002.arrow, ...       a dataset
DIR/dataset_dict.json, DIR/train/..., DIR/test/...                               a dataset for each split
"""

import json
from pathlib import Path

from data_pipeline.corpora.files import File, local_file
from data_pipeline.printable import shown

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_MOST_BYTES = 16 << 20  # of these files


def is_saved(path: Path) -> bool:
    """Return whether a folder was written by `save_to_disk`."""
    return (path / _SPLITS).is_file() or ((path / _STATE).is_file() and (path / _INFO).is_file())


def saved_files(path: Path, split: str | None) -> tuple[list[File], str]:
    """Return the Arrow files of a saved dataset in order, and what it is, for people.

    Args:
        path: A folder for which `is_saved`.
        split: The split that is read; None is "train" where there are several.

    Raises:
        ValueError: There is no such split, or the folder is damaged. The message names the file.
    """
    label = f"saved dataset {str(path.absolute())!r}"
    if (path / _SPLITS).is_file():
        splits = _read(path / _SPLITS).get("splits")
        if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
            raise ValueError(f"{shown(str(path / _SPLITS))}: damaged, it lists no splits; save the dataset again")
        wanted = split or "train"
        if wanted not in splits or not _is_inside(wanted):
            listed = ", ".join(map(repr, splits))
            raise ValueError(f"{shown(str(path))}: no split {wanted!r}, only {listed}; choose one with --split")
        return _arrow_files(path / wanted), f"{label}, split {wanted!r}"
    own = _read(path / _STATE).get("_split")
    if split is not None and split != own:
        raise ValueError(
            f"{shown(str(path))}: is one split, {own or 'without a name'}, not {split!r}; leave out --split"
        )
    return _arrow_files(path), label


def _arrow_files(folder: Path) -> list[File]:
    state = folder / _STATE
    listed = _read(state).get("_data_files")
    files = listed if isinstance(listed, list) and listed else [None]
    names = [file.get("filename") if isinstance(file, dict) else None for file in files]
    if not all(isinstance(name, str) and _is_inside(name) for name in names):
        raise ValueError(f"{shown(str(state))}: damaged, it does not list files beside it; save the dataset again")
    try:
        return [local_file(folder / str(name)) for name in names]
    except OSError as error:
        raise ValueError(f"{shown(str(error.filename))}: {error.strerror}; {_STATE} lists it") from error


def _is_inside(name: str) -> bool:
    return Path(name).name == name and name not in (".", "..") and "\0" not in name


def _read(path: Path) -> dict:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES >> 20} MiB")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{shown(str(path))}: damaged or unreadable: {error}; save the dataset again") from error
    return value
