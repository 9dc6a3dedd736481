"""Prepared tokens as training samples and batches, in an order that is a function of the seed.

Shapes: N samples, T = seq_len, B = micro_batch_size, A = accumulation, W = world_size.
"""

import hashlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from data_pipeline.indexed import data_path
from data_pipeline.manifest import FILE_NAME, Manifest, open_shards
from data_pipeline.sampler import global_order, step_positions
from data_pipeline.tokenizer import Tokenizer

IGNORED_LABEL = -100  # the default ignore_index of torch.nn.functional.cross_entropy
MicroBatch = dict[str, torch.Tensor]


class TokenDataset:
    """One split of a directory written by `data_pipeline.prepare`, cut into samples of T + 1 tokens.

    The split's shards form one long sequence of tokens; sample i is tokens [i*T, i*T + T], so each token is predicted
    once per epoch (bar an incomplete sample at the end). `samples` reads by global position in an endless order,
    shuffled within each epoch by (seed, epoch).

    Attributes: n_vocab, eot_id, tokens_total, documents_total, samples_per_epoch, manifest, manifest_sha256 (of the
    file: a run that resumes can tell that its data changed), tokenizer (loaded on first use).

    Raises ValueError, naming the file, when the directory is not a complete prepared dataset or has too few tokens for
    one sample.
    """

    def __init__(self, path: str | Path, *, seq_len: int, split: str = "train", seed: int = 0, shuffle: bool = True):
        if seq_len < 1:
            raise ValueError(f"seq_len {seq_len}: must be at least 1")
        self.path = Path(path)
        self.seq_len, self.split, self.seed, self.shuffle = seq_len, split, seed, shuffle
        self.manifest = Manifest.read(path)
        self.manifest_sha256 = hashlib.sha256((self.path / FILE_NAME).read_bytes()).hexdigest()
        self.n_vocab: int = self.manifest.tokenizer["n_vocab"]
        self.eot_id: int = self.manifest.tokenizer["eot_id"]
        if split not in self.manifest.splits:
            raise ValueError(f"{path}: no split {split!r}, only {', '.join(self.manifest.splits)}")
        self._files = [reader.file for reader in open_shards(path, self.manifest, split)]
        self._ends = np.cumsum([file.n_tokens for file in self._files], dtype=np.int64)
        self.tokens_total = self.manifest.tokens(split)
        self.documents_total = self.manifest.documents(split)
        self.samples_per_epoch = (self.tokens_total - 1) // seq_len
        if self.samples_per_epoch < 1:
            raise ValueError(
                f"{path}: split {split!r} has {self.tokens_total} tokens, too few for one sample of seq_len + 1 = "
                f"{seq_len + 1}; prepare more text or a larger --validation-fraction, use a shorter seq_len"
                + (", or train with --validation.every 0" if split == "validation" else "")
            )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.load(self.path)
        if tokenizer.sha256 != self.manifest.tokenizer["sha256"]:
            raise ValueError(f"{self.path}: the tokenizer there is not the one that made its tokens")
        return tokenizer

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Tokens int64 [N, T+1] at global positions, int64 [N]; position p lies in epoch p // samples_per_epoch."""
        return self.read(global_order(positions, self.samples_per_epoch, seed=self.seed, shuffle=self.shuffle))

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Tokens int64 [N, T+1] of samples by index, each in [0, samples_per_epoch), in the order of the text."""
        starts = np.asarray(indices, dtype=np.int64) * self.seq_len
        shards = np.searchsorted(self._ends, starts, side="right")
        tokens = np.empty((len(starts), self.seq_len + 1), dtype=self._files[0].dtype)
        for row, start, shard in zip(tokens, starts.tolist(), shards.tolist()):
            filled = 0
            offset = start - (int(self._ends[shard - 1]) if shard else 0)
            while filled < len(row):
                file = self._files[shard]
                count = min(file.n_tokens - offset, len(row) - filled)
                file.read_into(offset, row[filled : filled + count])
                filled, shard, offset = filled + count, shard + 1, 0
        return tokens.astype(np.int64)

    def verify(self) -> None:
        """Reads everything and compares it with the manifest's SHA-256; raises ValueError naming the first file that
        differs.
        """
        for shard in self.manifest.splits[self.split]:
            with open(data_path(self.path / shard.name), "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                raise ValueError(
                    f"{data_path(self.path / shard.name)}: content differs from its SHA-256 in {FILE_NAME}"
                )


class BatchLoader:
    """Endless iterator over optimizer steps: each `next` gives this rank's `accumulation` micro-batches.

    A micro-batch is a dict of int64 CPU tensors: `input_ids` [B, T]; `labels` [B, T], the token after each input; and
    with `document_mask` `document_ids` [B, T], counted from 0 in each row (the end-of-text token belongs to the
    document it ends), where labels after an end-of-text, the first token of another document, are -100. Memory is
    pinned when CUDA is available.

    A step consumes W * A * B consecutive positions of the dataset's global order, the same ones on any number of ranks
    (see `sampler.step_positions`). `samples_consumed` is the only state: the position after the last step that was
    handed out, whatever was read ahead.

    prefetch: steps a background thread reads ahead (0: read when asked). Its errors are raised by `next`. `close` ends
        it.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        micro_batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        samples_consumed: int = 0,
        document_mask: bool = False,
        prefetch: int = 2,
    ):
        _check_layout(micro_batch_size, accumulation, rank, world_size)
        for name, value in (("samples_consumed", samples_consumed), ("prefetch", prefetch)):
            if value < 0:
                raise ValueError(f"{name} {value}: must not be negative")
        self.samples_per_step = world_size * accumulation * micro_batch_size
        self._samples_consumed = samples_consumed
        self._read_step = partial(
            _read_step,
            dataset,
            document_mask=document_mask,
            pin_memory=torch.cuda.is_available(),
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
        )
        self._prefetch = prefetch
        self._ready: queue.Queue | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        weakref.finalize(self, self._stop.set)  # a loader that is dropped without `close` still ends its thread

    @property
    def samples_consumed(self) -> int:
        return self._samples_consumed

    def __iter__(self) -> "BatchLoader":
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._failure is not None:
            raise self._failure
        if self._stop.is_set():
            raise StopIteration
        if self._prefetch == 0:
            step = self._read_step(self._samples_consumed)
        else:
            if self._thread is None:
                self._start()
            step = self._ready.get()
            if isinstance(step, BaseException):
                self._failure = step
                raise step
        self._samples_consumed += self.samples_per_step
        return step

    def close(self) -> None:
        """Ends the background thread; the loader gives no more steps. May be called twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _start(self) -> None:
        self._ready = queue.Queue(self._prefetch)
        # The thread must not hold this object, or it would never be collected.
        arguments = (self._read_step, self._samples_consumed, self.samples_per_step, self._ready, self._stop)
        self._thread = threading.Thread(target=_read_ahead, args=arguments, name="data-prefetch", daemon=True)
        self._thread.start()


def validation_batches(
    dataset: TokenDataset,
    *,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_samples: int | None = None,
    document_mask: bool = False,
) -> Iterator[MicroBatch]:
    """Micro-batches over `max_samples` samples (all when None) spread evenly over the split, always the same ones, each
    on exactly one rank, once.

    Every rank gets the same number of micro-batches, all of B rows, so that collectives stay in step; rows beyond the
    last sample have labels -100 throughout.
    """
    _check_layout(micro_batch_size, 1, rank, world_size)
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples {max_samples}: must be at least 1")
    count = min(dataset.samples_per_epoch, max_samples or dataset.samples_per_epoch)
    # Neighbouring samples come from the same documents: the first ones would stand for a few texts only.
    chosen = np.arange(count, dtype=np.int64) * dataset.samples_per_epoch // count
    layout = {"micro_batch_size": micro_batch_size, "rank": rank, "world_size": world_size}
    for consumed in range(0, count, micro_batch_size * world_size):
        (indices,) = step_positions(consumed, **layout)
        batch = _micro_batch(dataset.read(chosen[np.minimum(indices, count - 1)]), dataset.eot_id, document_mask)
        batch["labels"][torch.from_numpy(indices >= count)] = IGNORED_LABEL
        yield batch


def _check_layout(micro_batch_size: int, accumulation: int, rank: int, world_size: int) -> None:
    for name, value in (
        ("micro_batch_size", micro_batch_size),
        ("accumulation", accumulation),
        ("world_size", world_size),
    ):
        if value < 1:
            raise ValueError(f"{name} {value}: must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank}: must be in [0, {world_size})")


def _micro_batch(tokens_BT1: np.ndarray, eot_id: int, document_mask: bool) -> MicroBatch:
    inputs_BT, labels_BT = np.ascontiguousarray(tokens_BT1[:, :-1]), np.ascontiguousarray(tokens_BT1[:, 1:])
    arrays = {"input_ids": inputs_BT, "labels": labels_BT}
    if document_mask:
        ends_BT = inputs_BT == eot_id
        labels_BT[ends_BT] = IGNORED_LABEL
        documents_BT = np.zeros_like(inputs_BT)
        np.cumsum(ends_BT[:, :-1], axis=1, out=documents_BT[:, 1:])
        arrays["document_ids"] = documents_BT
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _read_step(
    dataset: TokenDataset, samples_consumed: int, *, document_mask: bool, pin_memory: bool, **layout: int
) -> list[MicroBatch]:
    positions_AB = step_positions(samples_consumed, **layout)
    tokens_AB = dataset.samples(positions_AB.ravel()).reshape(*positions_AB.shape, -1)
    step = [_micro_batch(tokens_BT1, dataset.eot_id, document_mask) for tokens_BT1 in tokens_AB]
    if pin_memory:
        step = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in step]
    return step


def _read_ahead(
    read_step: Callable[[int], list[MicroBatch]],
    position: int,
    samples_per_step: int,
    ready: queue.Queue,
    stop: threading.Event,
) -> None:
    try:
        while not stop.is_set():
            _put(ready, read_step(position), stop)
            position += samples_per_step
    except BaseException as error:  # whatever it is, it belongs to the thread that asks for batches
        _put(ready, error, stop)


def _put(ready: queue.Queue, item: object, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            return ready.put(item, timeout=0.1)
        except queue.Full:
            continue
