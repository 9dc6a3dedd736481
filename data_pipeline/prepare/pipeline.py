"""From sources of text to a dataset in its place: what `python -m data_pipeline.prepare` does."""

import contextlib
import json
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data_pipeline.corpora.part import Source
from data_pipeline.disk import write_file_atomically
from data_pipeline.prepare.dedupe import gather
from data_pipeline.prepare.part import HASHES, Piece, finished_keys, hashes_path, piece_key
from data_pipeline.prepare.pool import make_pieces
from data_pipeline.prepare.progress import Progress
from data_pipeline.prepare.rules import Rules
from data_pipeline.prepare.workdir import output_path, replace, sweep_finished, working_directory
from data_pipeline.shards.checksums import check_content, record_content
from data_pipeline.shards.manifest import FILE_NAME, VERSION, Manifest, open_shards
from data_pipeline.shards.megatron import token_dtype
from data_pipeline.tokenizer.tokenizer import Tokenizer

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
