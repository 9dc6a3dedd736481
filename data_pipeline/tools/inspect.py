"""Print what is in a dataset, and what training sees of it.

python -m data_pipeline.inspect data/pystdlib
python -m data_pipeline.inspect data/pystdlib --document 3 --split validation
python -m data_pipeline.inspect data/pystdlib --sample 1000 --seq-len 512 --seed 1 --packing best_fit
python -m data_pipeline.inspect data/a data/b --weights 0.7,0.3 --at 100000
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipeline.batches import Packing
from data_pipeline.command_line import MISTAKE, Program, option, positional, print_line, ranged, run
from data_pipeline.shards.manifest import FILE_NAME, Manifest, open_shards
from data_pipeline.tokenizer.tokenizer import Tokenizer

_SHARDS_SHOWN = 10
_PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)


def summary(directory: str | Path) -> Iterator[str]:
    """Yield lines about splits, shards, lengths of documents, sources, what was dropped, and the tokenizer."""
    manifest = Manifest.read(directory)
    tokenizer = manifest.tokenizer
    yield f"{directory}: {manifest.storage} storage of {manifest.dtype}, content {manifest.content_sha256[:16]}"
    yield (
        f"tokenizer   {tokenizer['name']}, {tokenizer['n_vocab']:,} ids, end of text {tokenizer['eot_id']}, "
        f"{tokenizer['sha256'][:16]}"
    )
    for split, shards in manifest.splits.items():
        yield (
            f"{split:<11} {manifest.tokens(split):,} tokens in {manifest.documents(split):,} documents, "
            f"{len(shards)} shards"
        )
        if manifest.documents(split):
            lengths = np.concatenate([reader.lengths for reader in open_shards(directory, manifest, split)])
            values = np.percentile(lengths, _PERCENTILES, method="nearest")
            listed = "  ".join(f"p{p} {int(value):,}" for p, value in zip(_PERCENTILES, values))
            yield f"            tokens per document: mean {lengths.mean():,.1f}  {listed}"
        # Thousands of shards are as alike as ten.
        for shard in shards if len(shards) <= 2 * _SHARDS_SHOWN else shards[:_SHARDS_SHOWN]:
            largest = "" if shard.max_token is None else f", largest id {shard.max_token}"
            yield (
                f"            {shard.name}: {shard.tokens:,} tokens, {shard.documents:,} documents{largest}, "
                f"{shard.sha256[:16]}"
            )
        if len(shards) > 2 * _SHARDS_SHOWN:
            yield f"            and {len(shards) - _SHARDS_SHOWN} more"
    for source in manifest.sources:
        yield f"source      {source['source']} ({source['kind']})"
    for title, counts in (("dropped", manifest.dropped), ("irregular", manifest.irregular)):
        listed = ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)
        yield f"{title:<11} {listed or 'none'}"


def document(directory: str | Path, split: str, number: int) -> Iterator[str]:
    """Yield a line about document `number` of a split, counted from 0 over all shards, and its text."""
    manifest = _read_manifest(directory, split)
    if not 0 <= number < manifest.documents(split):
        raise ValueError(f"document {number}: {directory} has 0 to {manifest.documents(split) - 1} in split {split}")
    tokenizer, within = Tokenizer.load(directory), number
    for shard, reader in zip(manifest.splits[split], open_shards(directory, manifest, split)):
        if within < shard.documents:
            tokens = reader[within]
            yield f"document {number} of {split}: document {within} of {shard.name}, {len(tokens)} tokens"
            yield tokenizer.decode(tokens)
            return
        within -= shard.documents


def sample(
    directory: str | Path, split: str, number: int, *, seq_len: int, seed: int, packing: str = "contiguous"
) -> Iterator[str]:
    """Yield what training with `seed` reads at position `number`, as text.

    That is the inputs of the sample, and the label of the last input of each run of tokens. What comes of one document
    is under a line that says which document it is, and which of its tokens follow.

    Args:
        directory: The dataset.
        split: "train" or "validation".
        number: The position in the order of the samples, from 0.
        seq_len: Tokens of a sample.
        seed: That of the order.
        packing: "contiguous", "best_fit" or "varlen".
    """
    from data_pipeline.batches.documents import open_dataset

    if number < 0:
        raise ValueError(f"sample {number}: must not be negative")
    dataset = open_dataset(directory, packing=packing, seq_len=seq_len, split=split, seed=seed)
    index = dataset.order(np.array([number]))
    batch = {name: array[0] for name, array in dataset.micro_batch(index).items()}
    yield (
        f"sample {number} of {split}, seed {seed}, {packing}: epoch {number // dataset.samples_per_epoch}, sample "
        f"{int(index[0]):,} of {dataset.samples_per_epoch:,}, {len(batch['labels']):,} inputs"
    )
    starts, lengths, _ = (array.tolist() for array in dataset.spans(index))
    spans = [(start, start + length + 1) for start, length in zip(starts, lengths)]
    end = 0
    for (start, _), length, found in zip(spans, lengths, _documents_at(directory, dataset.manifest, split, spans)):
        first, end = end, end + length
        if start < 0:
            yield f"--- padding, {length:,} tokens"
            continue
        tokens = [*batch["input_ids"][first:end], batch["labels"][end - 1]]
        for title, begin, stop, place in found:
            yield f"--- {title}, tokens {begin:,} to {stop - 1:,}, {stop - begin:,} tokens"
            yield dataset.tokenizer.decode(tokens[place + begin - start : place + stop - start])


def mixture(
    directories: list[str], weights: list[float] | None, split: str, *, at: int, seq_len: int, packing: str
) -> Iterator[str]:
    """Yield what training has read of each source after `at` samples of a mixture."""
    from data_pipeline.batches.documents import open_dataset
    from data_pipeline.batches.mixture import MixtureDataset, WeightedDataset

    if weights is not None and len(weights) != len(directories):
        raise ValueError(
            f"--weights: {len(weights)} of them for {len(directories)} datasets; give W,W with one for each"
        )
    mixed = MixtureDataset(
        [
            WeightedDataset(name, open_dataset(name, packing=packing, seq_len=seq_len, split=split), weight)
            for name, weight in zip(directories, weights or itertools.repeat(None))
        ]
    )
    yield f"after {at:,} samples of up to {seq_len} tokens, {packing}:"
    for used in mixed.usage(at):
        yield (
            f"  {used.name}: {used.samples:,} samples, {used.tokens:,} tokens, {used.share:.3%} of them (wanted: "
            f"{mixed.weights[used.name]:.3%}), {used.epochs:.3f} epochs"
        )


def _documents_at(
    directory: str | Path, manifest: Manifest, split: str, spans: list[tuple[int, int]]
) -> list[list[tuple[str, int, int, int]]]:
    """Find the documents in spans of positions of a split.

    Args:
        directory: The dataset.
        manifest: Its manifest.
        split: "train" or "validation".
        spans: [start, end) of each.

    Returns:
        For each span its documents: (title, the first of its tokens that lies there, one after the last, the position
        at which the document begins).
    """
    found: list[list[tuple[str, int, int, int]]] = [[] for _ in spans]
    base = number = 0
    for shard, reader in zip(manifest.splits[split], open_shards(directory, manifest, split)):
        after = base + shard.tokens
        here = [(span, titles) for span, titles in zip(spans, found) if base < span[1] and 0 <= span[0] < after]
        ends = base + np.cumsum(reader.lengths if here else [], dtype=np.int64)
        for (start, end), titles in here:
            last = min(int(np.searchsorted(ends, end, side="left")), len(ends) - 1)
            for i in range(int(np.searchsorted(ends, start, side="right")), last + 1):
                begin, stop = int(ends[i]) - int(reader.lengths[i]), int(ends[i])
                title = f"document {number + i} ({i} of {shard.name}, {stop - begin:,} tokens)"
                titles.append((title, max(start - begin, 0), min(end, stop) - begin, begin))
        base, number = after, number + shard.documents
    return found


def _read_manifest(directory: str | Path, split: str) -> Manifest:
    manifest = Manifest.read(directory)
    if split not in manifest.splits:
        raise ValueError(f"{Path(directory) / FILE_NAME}: no split {split!r}, only {', '.join(manifest.splits)}")
    return manifest


@dataclass
class InspectOptions:
    """Print what is in a dataset, a document, or a sample."""

    directories: list[str] = positional("DIR")
    """Prepared datasets; of several: what a mixture of them reads."""
    split: Literal["train", "validation"] = "train"
    """Which of the splits."""
    document: int | None = option(None, metavar="N", at_least=0)
    """Print the text of one document, counted from 0."""
    sample: int | None = option(None, metavar="N", at_least=0, at_most=1 << 62)
    """Print what training reads at position N, counted from 0."""
    seq_len: int = ranged(512, at_least=1)
    """Tokens of a sample."""
    seed: int = 0
    """Seed of the order of samples: the run's."""
    packing: Packing = "contiguous"
    """How samples are made of documents: the run's."""
    weights: str | None = option(None, metavar="W,W,...")
    """Weights of a mixture; null is in proportion to the tokens."""
    at: int = ranged(100_000, at_least=0)
    """Samples of a mixture to count."""

    def __post_init__(self) -> None:
        several, one_thing = len(self.directories) > 1, self.document is not None or self.sample is not None
        if self.document is not None and self.sample is not None:
            raise ValueError("--document and --sample: give one of them")
        if self.weights is not None and not several:
            raise ValueError("--weights: are those of a mixture; give several directories")
        if one_thing and several:
            raise ValueError("--document and --sample: are those of one dataset; give one directory")
        self._check_used(several)
        self.numbers()

    def _check_used(self, several: bool) -> None:
        """Check that what is given means something for what is printed.

        Raises:
            ValueError: It does not; the message names the option.
        """
        of_sample = self.sample is not None
        of_samples = "is that of a sample; give --sample N"
        for name, is_used, remedy in (
            ("seed", of_sample, of_samples),
            ("seq_len", of_sample or several, of_samples),
            ("packing", of_sample or several, of_samples),
            ("split", of_sample or several or self.document is not None, "give --document N or --sample N with it"),
            ("at", several, "is about a mixture; give several directories"),
        ):
            if not is_used and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"--{name.replace('_', '-')}: {remedy}")

    def numbers(self) -> list[float] | None:
        """Return the weights as numbers."""
        try:
            return None if self.weights is None else [float(part) for part in self.weights.split(",")]
        except ValueError:
            message = f"--weights {self.weights!r}: must be numbers separated by commas, such as 0.7,0.3"
            raise ValueError(message) from None


def main(argv: list[str] | None = None) -> int:
    """Print what the command line asks for; return the exit code."""
    return run(Program("python -m data_pipeline.inspect", failed=MISTAKE), InspectOptions, _inspect, argv)


def _inspect(options: InspectOptions) -> None:
    directory, split = options.directories[0], options.split
    seq_len, packing = options.seq_len, options.packing
    if len(options.directories) > 1:
        lines = mixture(options.directories, options.numbers(), split, at=options.at, seq_len=seq_len, packing=packing)
    elif options.document is not None:
        lines = document(directory, split, options.document)
    elif options.sample is not None:
        lines = sample(directory, split, options.sample, seed=options.seed, seq_len=seq_len, packing=packing)
    else:
        lines = summary(directory)
    print_line("\n".join(lines))  # all or nothing, where a shard turns out to be damaged
