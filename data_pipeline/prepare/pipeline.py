"""From sources of text to a dataset in its place: what `python -m data_pipeline.prepare` does."""

import contextlib
import functools
import json
import platform
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipeline.corpora.kinds import PREPARED_FILE
from data_pipeline.corpora.part import Part, TextSource
from data_pipeline.disk import write_file_atomically
from data_pipeline.foreign import read_json
from data_pipeline.prepare.dedupe import assemble_splits
from data_pipeline.prepare.on_ray import prepare_parts_on_ray
from data_pipeline.prepare.part import (
    HASHES,
    Preparation,
    PreparedPart,
    finished_keys,
    hashes_path,
    part_key,
    tokenizer_folder,
)
from data_pipeline.prepare.pool import prepare_parts
from data_pipeline.prepare.progress import Progress
from data_pipeline.prepare.rules import Rules
from data_pipeline.prepare.workdir import (
    publish_dataset,
    range_directory,
    remove_if_finished,
    working_directory,
)
from data_pipeline.printable import printable
from data_pipeline.shards.checksums import check_content, record_content
from data_pipeline.shards.manifest import FILE_NAME, MOST_MANIFEST_BYTES, VERSION, Manifest, Shard, open_shards
from data_pipeline.shards.megatron import token_dtype
from data_pipeline.shards.output import output_path
from data_pipeline.tokenizer.tokenizer import Tokenizer

SETTINGS_FILE_NAME = (
    "prepare.json"  # what was asked for, to recognise the same request; it may name local files, the manifest does not
)
_OURS = (SETTINGS_FILE_NAME, PREPARED_FILE)
"""What every dataset of `prepare` holds, and no other folder."""
MALFORMED_FILE_NAME = "malformed.log"
FINAL = "final-"  # the rest of the name is random: no process that was taken for dead writes to this folder
_FIRST_NAMED = 3  # malformed records


@dataclass(frozen=True)
class _Request:
    """What was asked for, wherever the result goes."""

    sources: list[TextSource]
    """The texts, in order."""
    tokenizer: Tokenizer
    rules: Rules
    report: Callable[[str], None]
    """What takes lines for people."""
    workers: int | None = None
    """The number of processes; None is 1, and with Ray as many as its machines have processors."""
    executor: Literal["processes", "ray"] = "processes"
    """What runs them."""
    max_malformed: float = 0.001
    """The share of the records that may hold no text."""

    def __post_init__(self):
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers {self.workers}: must be at least 1")
        if self.executor not in ("processes", "ray"):
            raise ValueError(f"executor {self.executor!r}: must be processes or ray")
        if not 0 <= self.max_malformed <= 1:
            raise ValueError(f"max_malformed {self.max_malformed}: must be a share, from 0 to 1")

    def settings(self) -> dict:
        """Return everything that the bytes of the dataset depend on, as it is read back from JSON."""
        settings = {
            "version": VERSION,
            "sources": [[source.spec, source.fingerprint] for source in self.sources],
            "tokenizer_sha256": self.tokenizer.sha256,
            **self.rules.fingerprint(),
        }
        return json.loads(json.dumps(settings))

    def keys(self) -> list[str]:
        """Return the keys of the parts of all sources, in order."""
        return [key for key, _ in self._keyed]

    def keyed_parts(self) -> dict[str, Part]:
        """Return the parts of all sources in order, by key. A file that is named twice has two parts of one key."""
        return dict(self._keyed)

    @functools.cached_property
    def _keyed(self) -> list[tuple[str, Part]]:
        parts = [part for source in self.sources for part in source.parts]
        return [(part_key(part, self.rules, self.tokenizer), part) for part in parts]


def prepare(
    sources: list[TextSource],
    output: str | Path,
    tokenizer: Tokenizer,
    *,
    workers: int | None = None,
    executor: Literal["processes", "ray"] = "processes",
    max_malformed: float = 0.001,
    overwrite: bool = False,
    report: Callable[[str], None] = print,
    **options,
) -> Manifest:
    """Write the documents of `sources`, in order, as a dataset in the directory `output`.

    A document's SHA-256 alone decides its split, so no text is in both. Each document ends with the tokenizer's
    end-of-text token. Each part of the sources becomes shards of its own, in OUTPUT.preparing, by processes side by
    side; whatever is complete there is taken over. When all are, copies of earlier documents are taken out, what is
    held out is brought together, and the result is renamed into place. When `output` already holds the result of the
    same request, nothing is done.

    Args:
        sources: The texts.
        output: The directory to create.
        tokenizer: What makes ids of the texts.
        workers: The number of processes; None is 1, and with Ray as many as its machines have processors.
        executor: What runs them: "processes" of this machine, or "ray", on the cluster of RAY_ADDRESS, or else on
            one that is begun on this machine.
        max_malformed: The share of the records that may hold no text; they are left out and listed in malformed.log.
        overwrite: Replace a dataset at `output` that `prepare` made, but nothing else.
        report: Takes lines for people.
        **options: What becomes of a text: the fields of `Rules`.

    Returns:
        The manifest of the dataset.

    Raises:
        ValueError: An argument is bad, too many records are, there is no training text, or `output` holds something
            else.
        OSError: The dataset cannot be written.
    """
    request = _Request(sources, tokenizer, Rules(**options), report, workers, executor, max_malformed)
    output = output_path(output)
    settings = request.settings()
    if (existing := _existing_dataset(output, settings, overwrite)) is not None:
        report(f"{output}: already prepared, {_summary(existing)}")
        remove_if_finished(output, set(request.keyed_parts()), report)
        return existing
    _report_sources(request)
    with working_directory(output, report) as (folder, ownership), _naming_folder_in_errors(folder):
        # Again, now that no other process can be at it; and once more before something might be replaced.
        if (existing := _existing_dataset(output, settings, overwrite)) is not None:
            return existing
        final, manifest = _prepare_in_folder(request, settings, folder)
        _existing_dataset(output, settings, overwrite)
        if lost_to := ownership.lost():
            raise ValueError(f"{folder}: {lost_to} has taken it over, as this process was suspended for long")
        publish_dataset(folder, final, output)
        record_content(output, manifest)  # now that nothing else links to its files
    _report_result(output, manifest, request)
    return manifest


def prepare_range(
    sources: list[TextSource],
    output: str | Path,
    tokenizer: Tokenizer,
    *,
    index: int,
    count: int,
    workers: int | None = None,
    executor: Literal["processes", "ray"] = "processes",
    overwrite: bool = False,
    report: Callable[[str], None] = print,
    **options,
) -> None:
    """Prepare the parts `index`, `index + count`, `index + 2 * count`... of the sources, and no dataset yet.

    Processes on any machines that see the folder OUTPUT.preparing may prepare all ranges side by side. A call of
    `prepare` with the same arguments after that takes the parts over, prepares what is missing, and makes the dataset.

    Args:
        sources: The texts.
        output: The directory that `prepare` will create.
        tokenizer: What makes ids of the texts.
        index: The number of the range, from 0.
        count: The number of ranges.
        workers: As for `prepare`.
        executor: As for `prepare`.
        overwrite: As for `prepare`; nothing is replaced yet.
        report: Takes lines for people.
        **options: The fields of `Rules`.

    Raises:
        ValueError: As for `prepare`, but for the share of bad records.
        OSError: The parts cannot be written.
    """
    if not 0 <= index < count:
        raise ValueError(f"range {index}/{count}: must be from 0/{count} to {count - 1}/{count}")
    request = _Request(sources, tokenizer, Rules(**options), report, workers, executor)
    output = output_path(output)
    if (existing := _existing_dataset(output, request.settings(), overwrite)) is not None:
        report(f"{output}: already prepared, {_summary(existing)}")
        return
    _report_sources(request)
    parts = request.keyed_parts()
    own = dict(list(parts.items())[index::count])
    with range_directory(output, index, count, own.keys(), report) as folder, _naming_folder_in_errors(folder):
        # Again, now that nobody can be about to make it.
        if (existing := _existing_dataset(output, request.settings(), overwrite)) is None:
            tokenizer.save(tokenizer_folder(folder, tokenizer.sha256))
            prepared = _prepare_missing_parts(request, folder, list(own), own)
    if existing is not None:
        report(f"{output}: already prepared, {_summary(existing)}")
        remove_if_finished(output, set(parts), report)
        return
    report(
        f"{folder}: range {index}/{count} is done, which is {len(prepared)} parts; of all {len(parts)}, "
        f"{len(finished_keys(folder) & parts.keys())} are; when all ranges are, the same command without --part-range "
        "makes the dataset"
    )


def _report_sources(request: _Request) -> None:
    for source in request.sources:
        request.report(f"{source.spec}: {source.description}")
        if source.left_out:
            request.report(f"  left out: {source.left_out}")


def _report_result(output: Path, manifest: Manifest, request: _Request) -> None:
    request.report(f"{output}: {_summary(manifest)}")
    if request.rules.validation_fraction and not manifest.splits["validation"]:
        request.report(
            "warning: no document fell into the validation split, which is decided by their texts; train with "
            "--validation.every 0, or prepare again with --overwrite and a larger --validation-fraction than "
            f"{request.rules.validation_fraction:g}"
        )


@contextlib.contextmanager
def _naming_folder_in_errors(folder: Path) -> Iterator[None]:
    """Name the folder in errors of writing, such as a full disk, that name no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(folder)
        raise


def _prepare_in_folder(request: _Request, settings: dict, folder: Path) -> tuple[Path, Manifest]:
    """Write the whole dataset to a new directory in `folder`."""
    tokenizer = request.tokenizer
    tokenizer.save(tokenizer_folder(folder, tokenizer.sha256))
    parts = _prepare_missing_parts(request, folder, request.keys(), request.keyed_parts())
    examples = _check_malformed(parts, request.max_malformed, request.report)
    for killed in folder.glob(f"{FINAL}*"):
        shutil.rmtree(killed, ignore_errors=True)
    final = folder / (FINAL + secrets.token_hex(8))
    final.mkdir()
    tokenizer.save(final)
    splits, dropped = assemble_splits(folder, final, parts, request.rules, token_dtype(tokenizer.n_vocab))
    if malformed := sum(part.malformed for part in parts):
        dropped = {**dropped, "malformed": malformed}
    if not splits["train"]:
        _remove_parts(folder, parts)
        raise ValueError(_nothing_to_train_on(parts, splits["validation"], dropped))
    irregular = sum((Counter(part.irregular) for part in parts), Counter())
    manifest = Manifest(
        tokenizer=tokenizer.description(),
        dtype=token_dtype(tokenizer.n_vocab).name,
        splits=splits,
        sources=[{"source": source.spec, "kind": source.kind} for source in request.sources],
        dropped=dropped,
        irregular={reason: irregular[reason] for reason in ("split", "repaired")},
        python_version=platform.python_version(),
    )
    if examples:
        write_file_atomically(final / MALFORMED_FILE_NAME, "".join(f"{line}\n" for line in examples).encode())
    write_file_atomically(final / SETTINGS_FILE_NAME, (json.dumps(settings, indent=1) + "\n").encode())
    write_file_atomically(final / FILE_NAME, manifest.to_json())
    return final, manifest


def _remove_parts(folder: Path, parts: list[PreparedPart]) -> None:
    for part in parts:
        for path in folder.glob(f"{part.key}*"):
            path.unlink()


def _nothing_to_train_on(parts: list[PreparedPart], validation: list[Shard], dropped: dict[str, int]) -> str:
    """Return a message of what became of the records of a corpus that leaves no training text."""
    counts = {"records read": sum(part.records for part in parts)} | dropped
    if held_out := sum(shard.documents for shard in validation):
        counts["held out for validation"] = held_out
    counted = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count or name == "records read")
    return f"there is no training text in the sources, so nothing was prepared: {counted}"


def _existing_dataset(output: Path, settings: dict, overwrite: bool) -> Manifest | None:
    """Return the dataset that is at `output` if it answers the same request, and None if `output` may be written.

    Raises:
        ValueError: `output` must not be written.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not all((output / name).is_file() for name in _OURS):  # a manifest alone may be any program's, or an adopted one
        raise ValueError(
            f"{output}: exists and is not a dataset that prepare made, which has {' and '.join(_OURS)}; choose "
            "another output directory"
        )
    try:
        found = read_json(output / SETTINGS_FILE_NAME, dict[str, Any], most=MOST_MANIFEST_BYTES)
        manifest = Manifest.read(output)
        for split in manifest.splits:
            open_shards(output, manifest, split)
        differing = sorted(key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key))
        differences = (_difference(key, found.get(key), settings.get(key)) for key in differing)
        problem = f"was prepared with other settings ({', '.join(differences)})" if differing else None
        if overwrite and not differing:  # who asks for it may know of damage that sizes do not show
            check_content(output, manifest, always=True)
    except (OSError, ValueError) as error:
        problem = f"holds a damaged dataset ({error})"
    if problem is None:
        return manifest
    if not overwrite:
        raise ValueError(f"{output}: {problem}; choose another output directory, or replace it with --overwrite")
    return None


def _difference(key: str, theirs: object, ours: object) -> str:
    """Return a message that a setting differs, and how, where that is short."""
    if key == "tokenizer_sha256":
        return "another tokenizer"
    if isinstance(theirs, (list, dict)) or isinstance(ours, (list, dict)):
        return f"other {key}"
    return printable(f"{key} {theirs}, not {ours}")


def _prepare_missing_parts(
    request: _Request, folder: Path, keys: list[str], parts: dict[str, Part]
) -> list[PreparedPart]:
    """Return the prepared parts in order: all of them, or as many as hold `max_documents`.

    Those that are complete in `folder` are taken over.

    Args:
        request: What was asked for.
        folder: The working directory.
        keys: The keys of the parts that are wanted, in order; one that comes twice is prepared once.
        parts: These parts by key.
    """
    prepared = {key: part for key in parts if (part := PreparedPart.read(folder, key)) is not None}
    if prepared:
        done = sum(key in prepared for key in keys)
        request.report(f"continuing: {done} of {len(keys)} parts are done already")
    if others := finished_keys(folder) - request.keyed_parts().keys():
        request.report(
            f"{folder} holds {len(others)} parts of another request (are the options the same?); they are removed when "
            "the dataset is made"
        )
    missing = {key: part for key, part in parts.items() if key not in prepared}
    first_parts = _FirstParts(folder, keys, request.rules)
    if missing and not first_parts.hold_enough(prepared):
        preparation = Preparation(folder, request.rules, request.tokenizer)
        progress = Progress(sum(part.size for part in missing.values()), request.report)
        with progress, contextlib.closing(_arriving(request, missing, preparation, progress.count)) as arriving:
            for part in arriving:
                prepared[part.key] = part
                progress.finish_part(parts[part.key].size)
                if first_parts.hold_enough(prepared):
                    break
    used = keys[: first_parts.counted] if first_parts.hold_enough(prepared) else keys
    return [prepared[key] for key in used]


def _arriving(
    request: _Request, missing: dict[str, Part], preparation: Preparation, watch: Callable[[int, int], None]
) -> Generator[PreparedPart, None, None]:
    if request.executor == "ray":
        return prepare_parts_on_ray(missing, preparation, request.workers, watch, request.report)
    return prepare_parts(missing, preparation, request.workers or 1, watch)


class _FirstParts:
    """A count of the distinct documents of the first parts, to stop when these hold `max_documents`."""

    def __init__(self, folder: Path, keys: list[str], rules: Rules):
        self.folder, self.keys, self.rules = folder, keys, rules
        self.counted = 0  # parts
        self.documents: set[tuple[int, int]] = set()

    def hold_enough(self, prepared: Collection[str]) -> bool:
        """Return whether the first parts, without a gap, hold `max_documents` distinct documents.

        Args:
            prepared: The keys of all parts that are complete; none is ever taken out.
        """
        most = self.rules.max_documents
        if most is None:
            return False
        while len(self.documents) < most and self.counted < len(self.keys) and self.keys[self.counted] in prepared:
            table = np.fromfile(hashes_path(self.folder, self.keys[self.counted]), HASHES)
            if self.rules.deduplicate:
                self.documents.update(zip(table["high"].tolist(), table["low"].tolist()))
            else:
                self.documents.update((self.counted, place) for place in range(len(table)))
            self.counted += 1
        return len(self.documents) >= most


def _check_malformed(parts: list[PreparedPart], most: float, report: Callable[[str], None]) -> list[str]:
    """Return the malformed records that are listed, and report the first of them.

    Raises:
        ValueError: They are more than the share `most` of all records.
    """
    count, records = sum(part.malformed for part in parts), sum(part.records for part in parts)
    examples = [line for part in parts for line in part.examples]
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
