"""Text into a prepared dataset: a directory of Megatron shards, a manifest and the tokenizer.

    python -m data_pipeline.prepare pystdlib --output data/pystdlib
    python -m data_pipeline.prepare corpus/*.jsonl.zst --output data/corpus --tokenizer o200k_harmony --workers 8
    python -m data_pipeline.prepare --config configs/data/tinystories.yaml --output data/tinystories

The directory appears whole or not at all; its bytes do not depend on the number of workers, nor on how often the
command was killed and given again.
"""

import argparse
import contextlib
import json
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import yaml

from data_pipeline import command
from data_pipeline.gather import gather
from data_pipeline.indexed import token_dtype
from data_pipeline.manifest import FILE_NAME, VERSION, Manifest, open_shards
from data_pipeline.pieces import HASHES, Piece, Rules, finished_keys, hashes_path, piece_key
from data_pipeline.progress import Progress
from data_pipeline.sources import Source, open_source
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from data_pipeline.unfinished import output_path, replace, sweep_finished, working_directory
from data_pipeline.verify import check_content, record_content
from data_pipeline.vocabulary import write_file_atomically
from data_pipeline.workers import make_pieces

SETTINGS_FILE_NAME = (
    "prepare.json"  # what was asked for, to recognise the same request; it may name local files, the manifest does not
)
MALFORMED_FILE_NAME = "malformed.log"
FINAL = "final"
_FIRST_NAMED = 3  # malformed records


def prepare(
    sources: list[Source],
    output: str | Path,
    tokenizer: Tokenizer,
    *,
    workers: int = 1,
    max_malformed: float = 0.001,
    overwrite: bool = False,
    report: Callable[[str], None] = print,
    **options,
) -> Manifest:
    """Writes the documents of `sources`, in order, as a dataset in the directory `output`, and returns its manifest.

    A document's SHA-256 alone decides its split, so no text is in both. Each document ends with the tokenizer's
    end-of-text token. Each part of the sources becomes shards of its own, in OUTPUT.preparing, by processes side by
    side; whatever is complete there is taken over. When all are, copies of earlier documents are taken out, what is
    held out is gathered, and the result is renamed into place.

    workers: processes. options: what becomes of a text, the fields of `Rules`. max_malformed: share of the records that
    may hold no text; they are left out and listed in malformed.log. When `output` already holds the result of the same
    request nothing is done.

    Raises ValueError for a bad argument, too many bad records, no training text, or an `output` that holds something
    else and `overwrite` is not set (with `overwrite` only a prepared dataset is replaced); OSError when it cannot be
    written.
    """
    rules = Rules(**options)
    if workers < 1:
        raise ValueError(f"workers {workers}: must be at least 1")
    if not 0 <= max_malformed <= 1:
        raise ValueError(f"max_malformed {max_malformed}: must be a share, from 0 to 1")
    output = output_path(output)
    settings = {
        "version": VERSION,
        "sources": [[source.spec, source.fingerprint] for source in sources],
        "tokenizer_sha256": tokenizer.sha256,
        **rules.fingerprint(),
    }
    settings = json.loads(json.dumps(settings))  # as it will be read back
    if (existing := _existing(output, settings, overwrite)) is not None:
        report(f"{output}: already prepared, {_summary(existing)}")
        sweep_finished(output, {piece_key(part, rules, tokenizer) for source in sources for part in source.parts})
        return existing
    for source in sources:
        report(f"{source.spec}: {source.description}")

    with working_directory(output) as folder, _naming(folder):
        # Again, now that no other process can be at it; and once more before something might be replaced.
        if (existing := _existing(output, settings, overwrite)) is not None:
            return existing
        manifest = _make(sources, folder, tokenizer, rules, workers, max_malformed, settings, report)
        _existing(output, settings, overwrite)
        replace(folder, folder / FINAL, output)
        record_content(output, manifest)  # now that nothing else links to its files
    report(f"{output}: {_summary(manifest)}")
    if rules.validation_fraction and not manifest.splits["validation"]:
        report(
            "warning: no document fell into the validation split; prepare again with --validation-fraction 0.2 "
            "--overwrite, say, or train with --validation.every 0"
        )
    return manifest


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Errors of writing, such as a full disk, do not name a file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(folder)
        raise


def _make(
    sources: list[Source],
    folder: Path,
    tokenizer: Tokenizer,
    rules: Rules,
    workers: int,
    max_malformed: float,
    settings: dict,
    report: Callable[[str], None],
) -> Manifest:
    """The whole dataset, in FOLDER/final."""
    tokenizer.save(folder)
    pieces = _make_pieces(sources, folder, rules, tokenizer, workers, report)
    examples = _check_malformed(pieces, max_malformed, report)
    final = folder / FINAL
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    tokenizer.save(final)
    splits, dropped = gather(folder, final, pieces, rules, token_dtype(tokenizer.n_vocab))
    if malformed := sum(piece.malformed for piece in pieces):
        dropped = {**dropped, "malformed": malformed}
    irregular = sum((Counter(piece.irregular) for piece in pieces), Counter())
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
        dropped=dropped,
        irregular={reason: irregular[reason] for reason in ("split", "repaired")},
        python_version=platform.python_version(),
    )
    if not splits["train"]:
        for piece in pieces:
            for path in folder.glob(f"{piece.key}*"):
                path.unlink()
        counts = {"records read": sum(piece.records for piece in pieces)} | dropped
        if held_out := sum(shard.documents for shard in splits["validation"]):
            counts["held out for validation"] = held_out
        counted = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count or name == "records read")
        raise ValueError(f"there is no training text in the sources, so nothing was prepared: {counted}")
    if examples:
        write_file_atomically(final / MALFORMED_FILE_NAME, "".join(f"{line}\n" for line in examples).encode())
    write_file_atomically(final / SETTINGS_FILE_NAME, (json.dumps(settings, indent=1) + "\n").encode())
    write_file_atomically(final / FILE_NAME, manifest.to_json())
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
        said = (_said(key, found.get(key), settings.get(key)) for key in differing)
        problem = f"was prepared with other settings ({', '.join(said)})" if differing else None
        if overwrite and not differing:  # who asks for it may know of damage that sizes do not show
            check_content(output, manifest, always=True)
    except (OSError, ValueError, AttributeError) as error:
        problem = f"holds a damaged dataset ({error})"
    if problem is None:
        return manifest
    if not overwrite:
        raise ValueError(f"{output}: {problem}; choose another output directory, or replace it with --overwrite")
    return None


def _said(key: str, theirs: object, ours: object) -> str:
    """What differs, and how, where that is short."""
    if key == "tokenizer_sha256":
        return "another tokenizer"
    if isinstance(theirs, (list, dict)) or isinstance(ours, (list, dict)):
        return f"other {key}"
    return f"{key} {theirs}, not {ours}"


def _make_pieces(
    sources: list[Source],
    folder: Path,
    rules: Rules,
    tokenizer: Tokenizer,
    workers: int,
    report: Callable[[str], None],
) -> list[Piece]:
    """The pieces of all parts in order, or of as many as hold `max_documents`."""
    parts = [part for source in sources for part in source.parts]
    keys = [piece_key(part, rules, tokenizer) for part in parts]
    pieces = {index: piece for index, key in enumerate(keys) if (piece := Piece.read(folder, key)) is not None}
    if pieces:
        report(f"continuing: {len(pieces)} of {len(parts)} parts are done already")
    if others := finished_keys(folder) - set(keys):
        report(f"{folder} holds {len(others)} parts of another request; they are removed when this one is done")
    seen: set[tuple[int, int]] = set()
    counted = 0

    def enough() -> bool:
        """Whether the first parts, without a gap, hold `max_documents` distinct documents."""
        nonlocal counted
        most = rules.max_documents
        while most is not None and counted in pieces and len(seen) < most:
            table = np.fromfile(hashes_path(folder, keys[counted]), HASHES)
            if rules.deduplicate:
                seen.update(zip(table["high"].tolist(), table["low"].tolist()))
            else:
                seen.update((counted, place) for place in range(len(table)))
            counted += 1
        return most is not None and len(seen) >= most

    places: dict[str, list[int]] = {}  # of each key: a file that is named twice is read once
    for index, key in enumerate(keys):
        places.setdefault(key, []).append(index)
    todo = [indices[0] for indices in places.values() if indices[0] not in pieces]
    if todo and not enough():
        size = sum(parts[index].size for index in todo)
        with Progress(size, report) as progress:
            made = make_pieces(
                [parts[i] for i in todo], [keys[i] for i in todo], folder, rules, tokenizer, workers, progress.work
            )
            with contextlib.closing(made):
                for position, piece in made:
                    pieces |= dict.fromkeys(places[piece.key], piece)
                    progress.done(parts[todo[position]].size)
                    if enough():
                        break
    return [pieces[index] for index in range(counted if enough() else len(parts))]


def _check_malformed(pieces: list[Piece], most: float, report: Callable[[str], None]) -> list[str]:
    """Names the malformed records. Raises ValueError when they are more than the share `most`."""
    count, records = sum(piece.malformed for piece in pieces), sum(piece.records for piece in pieces)
    examples = [line for piece in pieces for line in piece.examples]
    if count > most * records:
        raise ValueError(
            f"{count:,} of {records:,} records are malformed, more than --max-malformed {most:g} allows; mend them or "
            f"raise it: {'; '.join(examples[:_FIRST_NAMED])}"
        )
    if count:
        report(
            f"warning: {count:,} of {records:,} records are malformed and left out, listed in {MALFORMED_FILE_NAME}:"
        )
        for line in examples[:_FIRST_NAMED]:
            report(f"  {line}")
    return examples


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
    return command.run(lambda: _prepare(_arguments(argv)), interrupted="interrupted; the same command continues")


def _prepare(arguments: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(
        arguments.tokenizer,
        pattern=arguments.pattern,
        vocab_file=arguments.vocab_file,
        vocab_size=arguments.vocab_size,
    )
    tokenizer.engine = arguments.engine
    sources = [
        open_source(
            spec,
            text_column=arguments.text_column,
            split=arguments.split,
            config_name=arguments.name,
            revision=arguments.revision,
        )
        for spec in arguments.sources
    ]
    prepare(
        sources,
        arguments.output,
        tokenizer,
        workers=arguments.workers,
        max_malformed=arguments.max_malformed,
        overwrite=arguments.overwrite,
        report=lambda line: print(line, flush=True),
        normalization=arguments.normalization,
        min_characters=arguments.min_characters,
        max_characters=arguments.max_characters,
        filters=tuple(arguments.filter),
        deduplicate=not arguments.keep_duplicates,
        validation_fraction=arguments.validation_fraction,
        shard_tokens=arguments.shard_tokens,
        max_documents=arguments.max_documents,
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    """Raises ValueError for a bad recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.prepare",
        description="Tokenize text into a directory that training reads. A command that was interrupted or killed "
        "continues when it is given again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="pystdlib, installed, synthetic[:documents=N,seed=S]; files, globs or directories of .txt .md .jsonl "
        ".parquet (.gz .zst), also as s3://, gs:// or https:// URLs; or a Hugging Face dataset name",
    )
    add("--config", help="recipe: a YAML file of these options, such as configs/data/tinystories.yaml; options given "
        "here count more")  # fmt: skip
    add("--output", help="directory to create")
    add(
        "--tokenizer", default="builtin", help="builtin, bytes, o200k_harmony, o200k_base, cl100k_base, gpt2, or a path"
    )
    add("--pattern", help="word pattern of a tokenizer file that is not recognised")
    add("--vocab-file", help="rank file of an OpenAI tokenizer, instead of searching for it")
    add("--vocab-size", type=int, help="shorten the tokenizer to exactly this many ids")
    add("--engine", default="auto", choices=["auto", "tiktoken", "gigatoken"], help="what tokenizes; same ids")
    add("--text-column", default="text", help="field that holds the text in records")
    add("--split", help="split of a Hugging Face dataset (train when not given)")
    add("--name", help="configuration of a Hugging Face dataset")
    add("--revision", help="revision of a Hugging Face dataset")
    add("--normalization", choices=["NFC", "NFD", "NFKC", "NFKD"], help="Unicode normalization of the texts")
    add("--min-characters", type=int, default=0, help="drop shorter documents")
    add("--max-characters", type=int, help="drop longer documents")
    add("--filter", action="append", default=[], metavar="MODULE:FUNCTION",
        help="called with each text: True keeps it, False drops it, a text replaces it; may be repeated")  # fmt: skip
    add("--keep-duplicates", action="store_true", help="do not drop exact copies of earlier documents")
    add("--max-malformed", type=float, default=0.001, help="largest share of bad records; they are left out")
    add("--validation-fraction", type=float, default=0.01, help="share of the documents held out")
    add("--shard-tokens", type=int, default=1 << 26, help="most tokens of a shard file")
    add("--max-documents", type=int, help="stop after this many documents")
    add("--workers", type=int, default=1, help="processes")
    add("--overwrite", action="store_true", help="replace an existing dataset")
    arguments = parser.parse_args(argv)
    if arguments.config:
        parser.set_defaults(**_recipe(Path(arguments.config), parser))
        arguments = parser.parse_args(argv)
    for name in ("sources", "output"):
        if not getattr(arguments, name):
            raise ValueError(f"{name}: missing; see python -m data_pipeline.prepare --help")
    return arguments


def _recipe(path: Path, parser: argparse.ArgumentParser) -> dict:
    """Values of a YAML file by the names of options. Raises ValueError naming file and key."""
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected options, such as `tokenizer: builtin`")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    recipe = {}
    for key, value in values.items():
        action = actions.get(str(key).replace("-", "_"))
        if action is None:
            raise ValueError(f"{path}: unknown key {key!r}; known are {', '.join(sorted(actions))}")
        if action.nargs == "*" or isinstance(action.default, list):
            right = isinstance(value, list) and all(isinstance(item, str) for item in value)
            expected = "a list of texts"
        elif isinstance(action, argparse._StoreTrueAction):
            right, expected = isinstance(value, bool), "true or false"
        else:
            kinds = {int: int, float: (int, float), None: str}[action.type]
            right = isinstance(value, kinds) and not isinstance(value, bool)
            right = right and (action.choices is None or value in action.choices)
            right = right or (value is None and action.default is None)
            expected = f"one of {', '.join(action.choices)}" if action.choices else f"{action.type or str}"
        if not right:
            raise ValueError(f"{path}: {key}: {value!r} is not {expected}")
        recipe[action.dest] = value
    return recipe


if __name__ == "__main__":
    sys.exit(main())
