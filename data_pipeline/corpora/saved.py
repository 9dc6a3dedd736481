"""Folders that Hugging Face's `save_to_disk` wrote: which Arrow files a dataset consists of.

DIR/dataset_info.json, DIR/state.json, DIR/data-00000-of-00002.arrow, ...       a dataset
DIR/dataset_dict.json, DIR/train/..., DIR/test/...                               a dataset for each split
"""

from pathlib import Path

import msgspec

from data_pipeline.corpora.files import File, local_file
from data_pipeline.foreign import file_inside, read_json
from data_pipeline.printable import shown

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_REMEDY = "save the dataset again"


class _Splits(msgspec.Struct):
    """What is read of dataset_dict.json."""

    splits: list[str]


class _DataFile(msgspec.Struct):
    filename: str


class _State(msgspec.Struct):
    """What is read of state.json."""

    files: list[_DataFile] = msgspec.field(name="_data_files")
    split: str | None = msgspec.field(name="_split", default=None)


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
        splits = read_json(path / _SPLITS, _Splits, remedy=_REMEDY).splits
        wanted = split or "train"
        if wanted not in splits or Path(wanted).name != wanted or wanted == "..":
            listed = ", ".join(map(repr, splits))
            raise ValueError(f"{shown(str(path))}: no split {wanted!r}, only {listed}; choose one with --split")
        return _arrow_files(path / wanted), f"{label}, split {wanted!r}"
    own = read_json(path / _STATE, _State, remedy=_REMEDY).split
    if split is not None and split != own:
        its_name = repr(own) if own else "without a name"
        raise ValueError(f"{shown(str(path))}: is one split, {its_name}, not {split!r}; leave out --split")
    return _arrow_files(path), label


def _arrow_files(folder: Path) -> list[File]:
    listed = read_json(folder / _STATE, _State, remedy=_REMEDY).files
    if not listed:
        raise ValueError(f"{shown(str(folder / _STATE))}: lists no files; {_REMEDY}")
    try:
        return [local_file(file_inside(folder, file.filename)) for file in listed]
    except ValueError as error:
        raise ValueError(f"{error}; {_STATE} lists it, so {_REMEDY}") from error
