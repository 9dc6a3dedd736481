"""What perplexity is measured on: prepared datasets and texts, all opened before anything of them is scored.

Two ways to cut them into what the model sees:

    samples    as in training: samples of the packing, each token counted. The validation loss, of the same samples.
    windows    each document by itself, behind an end-of-text token, in windows of T tokens that begin `stride` apart:

               stride 3, T = 5     E a b c d                  counted: a b c d e
                                         c d e f g            counted:           f g h

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline import Tokenizer, open_dataset, open_source, validation_batches
from data_pipeline.batches.reading import IGNORED_LABEL
from data_pipeline.batches.token_split import TokenSplit
from data_pipeline.corpora.part import TextSource
from data_pipeline.tokenizer.tokenizer import repaired
from gptoss_dist.distributed.processes import Ranks

Batch = Mapping[str, np.ndarray]
"""`input_ids` and `labels` [B, T], and perhaps `document_ids` [B, T]."""
WINDOWS_SORTED_TOGETHER = 512
WHOLE_DOCUMENTS = 2**31 - 1


@dataclass(frozen=True)
class Cut:
    """How data are cut into what the model sees."""

    seq_len: int
    stride: int | None = None
    packing: str = "contiguous"
    document_mask: bool = False
    samples: int | None = None
    """Samples of prepared data, or documents in windows, evenly over each source; None is all."""
    seed: int = 0
    split: str = "validation"
    text_column: str = "text"


@dataclass(frozen=True)
class Text:
    """A text of which it is known what is scored: that no record is malformed was seen when it was opened."""

    source: TextSource
    places: np.ndarray
    """Which of its records are scored, ascending, int64."""
    dropped: dict[str, int]
    """How many are not, by reason, as in the manifest of prepared data."""

    def documents(self, most: int | None) -> Iterator[str]:
        """Yield documents, evenly over the text."""
        wanted = (int(self.places[index]) for index in _evenly(len(self.places), most))
        place = next(wanted)
        for number, text in enumerate(self.source.documents()):
            if number == place:
                yield text
                if (place := next(wanted, -1)) < 0:
                    return


@dataclass(frozen=True)
class Source:
    """Something to score, opened."""

    name: str
    path: str
    opened: TokenSplit | Text
    """Prepared data as samples or, for windows, as whole documents; or a text."""
    cut: Cut

    @property
    def is_packed(self) -> bool:
        """Whether it is cut into the samples of training, and not into windows."""
        return isinstance(self.opened, TokenSplit) and self.cut.stride is None

    @property
    def cut_in_words(self) -> str:
        """How it is cut."""
        cut = self.cut
        if self.is_packed:
            return f"{cut.packing}, {cut.seq_len}"
        return f"windows of {cut.seq_len}, stride {cut.stride or cut.seq_len}"

    @property
    def dropped(self) -> dict[str, int]:
        """How many records of a text are left out, by reason."""
        return self.opened.dropped if isinstance(self.opened, Text) else {}

    def batches(self, tokenizer: Tokenizer, ranks: Ranks, batch_tokens: int) -> Iterator[Batch]:
        """Yield a rank's share of what is scored.

        Args:
            tokenizer: The model's.
            ranks: This process.
            batch_tokens: Tokens of a batch, padding included; a longer window is a batch by itself.
        """
        if isinstance(self.opened, Text):
            documents = _documents_of_text(self.opened, self.cut, tokenizer)
        elif self.is_packed:
            yield from _samples(self.opened, self.cut, ranks, batch_tokens)
            return
        else:
            documents = _documents(self.opened, self.cut.samples)
        windows = _windows(documents, self.cut.seq_len, self.cut.stride or self.cut.seq_len, tokenizer.eot_id)
        mine = itertools.islice(windows, ranks.rank, None, ranks.world_size)
        yield from _batched(mine, batch_tokens, tokenizer.eot_id)


def is_prepared(path: str) -> bool:
    """Return whether a path names prepared data, and not a text."""
    return (Path(path) / "manifest.json").is_file()


def open_to_score(name: str, path: str, cut: Cut, tokenizer: Tokenizer) -> Source:
    """Open prepared data or a text, of which every record is read once to see whether it can be scored.

    Args:
        name: What the results call it.
        path: Where it is.
        cut: How it will be cut.
        tokenizer: The model's.

    Raises:
        ValueError: It cannot be read, holds no document, or was prepared with another tokenizer.
    """
    return Source(name, path, _open_split(path, cut, tokenizer) if is_prepared(path) else _open_text(path, cut), cut)


def _open_split(path: str, cut: Cut, tokenizer: Tokenizer) -> TokenSplit:
    packing, seq_len = (cut.packing, cut.seq_len) if cut.stride is None else ("varlen", WHOLE_DOCUMENTS)
    split = open_dataset(path, packing=packing, seq_len=seq_len, split=cut.split, seed=cut.seed)
    if split.tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(
            f"{path} was made with tokenizer {split.tokenizer.name}, and the model's is {tokenizer.name}; "
            "prepare the text with the model's, or name the text itself"
        )
    return split


def _open_text(spec: str, cut: Cut) -> Text:
    """Open a text, and leave out what `prepare` would: empty records, and exact copies of earlier ones."""
    source = open_source(spec, text_column=cut.text_column)
    seen: set[bytes] = set()
    places: list[int] = []
    dropped = {"empty": 0, "duplicate": 0}
    for place, text in enumerate(source.documents()):
        if not text:
            dropped["empty"] += 1
            continue
        digest = hashlib.sha256(repaired(text).encode()).digest()[:16]
        if digest in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(digest)
        places.append(place)
    if not places:
        raise ValueError(f"{spec}: holds no document")
    return Text(source, np.array(places), dropped)


def _samples(split: TokenSplit, cut: Cut, ranks: Ranks, batch_tokens: int) -> Iterator[Batch]:
    batches = validation_batches(
        split,
        micro_batch_size=max(1, batch_tokens // cut.seq_len),
        rank=ranks.rank,
        world_size=ranks.world_size,
        max_samples=cut.samples,
        document_mask=cut.document_mask,
    )
    for batch in batches:
        yield {name: tensor.numpy() for name, tensor in batch.items()}


def _documents(split: TokenSplit, most: int | None) -> Iterator[np.ndarray]:
    """Yield documents, evenly over a split, each with its end-of-text token."""
    for index in _evenly(split.samples_per_epoch, most):
        arrays = split.micro_batch(np.array([index]))
        yield np.concatenate([arrays["input_ids"][0], arrays["labels"][0, -1:]])


def _documents_of_text(text: Text, cut: Cut, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the documents of a text, each with an end-of-text token."""
    for document in text.documents(cut.samples):
        yield np.append(tokenizer.encode(document).astype(np.int64), tokenizer.eot_id)


def _evenly(count: int, most: int | None) -> Iterator[int]:
    chosen = min(count, most or count)
    return (index * count // chosen for index in range(chosen))


def _windows(
    documents: Iterator[np.ndarray], seq_len: int, stride: int, eot_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield inputs and labels of each window, int64 of the same length; labels that an earlier one had are -100."""
    for tokens in documents:
        inputs, counted = np.concatenate([[eot_id], tokens[:-1]]), 0
        while counted < len(tokens):
            end = min(counted + (stride if counted else seq_len), len(tokens))
            begin = max(0, end - seq_len)
            labels = tokens[begin:end].copy()
            labels[: counted - begin] = IGNORED_LABEL
            yield inputs[begin:end], labels
            counted = end


def _batched(windows: Iterator[tuple[np.ndarray, np.ndarray]], batch_tokens: int, padding_id: int) -> Iterator[Batch]:
    """Yield windows of like lengths together, padded behind, where no token sees the padding."""
    for group in iter(lambda: list(itertools.islice(windows, WINDOWS_SORTED_TOGETHER)), []):
        group.sort(key=lambda window: len(window[0]), reverse=True)
        while group:
            rows = max(1, batch_tokens // len(group[0][0]))
            taken, group = group[:rows], group[rows:]
            shape = (len(taken), len(taken[0][0]))
            ids, labels = np.full(shape, padding_id, np.int64), np.full(shape, IGNORED_LABEL, np.int64)
            for row, (inputs, targets) in enumerate(taken):
                ids[row, : len(inputs)], labels[row, : len(targets)] = inputs, targets
            yield {"input_ids": ids, "labels": labels}
