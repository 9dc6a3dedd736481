"""The command `prepare` called in this process, and what it wrote."""

from pathlib import Path

from data_pipeline import IndexedReader, Manifest, load_tokenizer
from data_pipeline.prepare.__main__ import main


def run(*arguments, capsys=None):
    code = main([str(argument) for argument in arguments])
    return code if capsys is None else (code, *capsys.readouterr())


def contents(directory):
    """By name of file; not the times of change in verified.json."""
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir()) if path.name != "verified.json"}


def documents_of(directory, split):
    tokenizer, texts = load_tokenizer(directory), []
    for shard in Manifest.read(directory).splits[split]:
        reader = IndexedReader(Path(directory) / shard.name)
        for i in range(len(reader)):
            assert reader[i][-1] == tokenizer.eot_id and (reader[i][:-1] != tokenizer.eot_id).all()
            texts.append(tokenizer.decode(reader[i][:-1].astype("int64")))
    return texts
