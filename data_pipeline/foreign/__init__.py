"""JSON and YAML files that somebody else may have written, read strictly, in one way.

Lines of JSON, of corpora and metrics, are read by `corpora/records.py` and `tracking/jsonl.py`. Files of settings are
read by jsonargparse, after `command_line/files.py` has checked them here.

    class Entry(msgspec.Struct):
        bytes: Count
        sha256: str

    entry = read_json(folder / "entry.json", Entry, remedy="write it again")

A file must be a regular one of limited size in UTF-8; what it holds is neither nested without end nor full of aliases
that multiply; no key is there twice; and what comes out has the types that were asked for. Whatever is wrong is one
ValueError of one line with file, key, value and remedy. `file_inside` is for names that a file gives to other files.
"""

from data_pipeline.foreign.files import check_folder, check_regular, file_inside, read_bytes, read_text
from data_pipeline.foreign.parsing import check_yaml, parse_json, parse_yaml
from data_pipeline.foreign.typed import Count, convert, read_json

__all__ = [
    "Count",
    "check_folder",
    "check_regular",
    "check_yaml",
    "convert",
    "file_inside",
    "parse_json",
    "parse_yaml",
    "read_bytes",
    "read_json",
    "read_text",
]
