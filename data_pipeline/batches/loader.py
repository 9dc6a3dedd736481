"""Batches for a training loop: the same global batch on any number of ranks, read ahead by threads.

Shapes: B = micro_batch_size, A = accumulation, W = world_size, T = seq_len.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from data_pipeline.batches.order import step_positions
from data_pipeline.batches.reading import IGNORED_LABEL, ReadPlan, Samples
from data_pipeline.batches.skipping import SkippedPositions

MicroBatch = dict[str, torch.Tensor]
_PLANNED_AT_ONCE = 1 << 23, 1 << 14
"""The most places for tokens, and the most spans in them, that a rank looks up in one go, unless one step has more.

numpy's cost per call is then small beside the reading, and the caller of `next` waits 50 ms at the most."""


class BatchLoader:
    """Iterator over optimizer steps: each `next` gives this rank's `accumulation` micro-batches.

    It is endless, unless the dataset is a mixture whose sources are all used up.

    A micro-batch is a dict of int64 CPU tensors `input_ids`, `labels` and, with `document_mask` or where the packing
    needs it, `document_ids`; see `micro_batch` of the dataset. Memory is pinned when CUDA is available.

    A step consumes the next W * A * B positions of the dataset's global order that are not `skipped`, the same ones on
    any number of ranks (see `order.step_positions`). `samples_consumed` is the only state: the position after the last
    one of the last step that was handed out, whatever was read ahead.

    Args:
        dataset: What is read.
        micro_batch_size: Samples of a micro-batch, B.
        accumulation: Micro-batches of a step on each rank, A.
        rank: This rank.
        world_size: Number of ranks, W.
        samples_consumed: The position to begin at.
        skipped: Positions that are passed over; by default none.
        document_mask: Give `document_ids` also where the packing does not need them.
        prefetch: Steps to read ahead; 0 reads when asked.
        workers: Threads that read ahead; 0 reads when asked. The order does not depend on them. Their errors are raised
            by `next`, and `close` ends them.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        dataset: Samples,
        *,
        micro_batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        samples_consumed: int = 0,
        skipped: SkippedPositions | None = None,
        document_mask: bool = False,
        prefetch: int = 2,
        workers: int = 1,
    ):
        _check_layout(micro_batch_size, accumulation, rank, world_size)
        for name, value in (("samples_consumed", samples_consumed), ("prefetch", prefetch), ("workers", workers)):
            if value < 0:
                raise ValueError(f"{name} {value}: must not be negative")
        self.samples_per_step = world_size * accumulation * micro_batch_size
        self._samples_consumed = samples_consumed
        self._skipped = skipped or SkippedPositions()
        self._dataset = dataset
        # What a thread runs must not hold this object, or it would never be collected.
        self._read = partial(_read_step, dataset, document_mask, torch.cuda.is_available())
        share = {
            "micro_batch_size": micro_batch_size,
            "accumulation": accumulation,
            "rank": rank,
            "world_size": world_size,
        }
        self._positions_AB = step_positions(0, **share)  # of every step, relative to its first read
        self._planned: deque[Sequence[ReadPlan]] = deque()
        # From here on positions are counted as reads, which leaves out the skipped ones.
        self._reads = self._next_read = self._skipped.reads_before(samples_consumed)
        self._steps_at_once = 1  # until it is known how much a step holds
        self._ahead = prefetch if workers else 0
        self._reading: deque[Future] = deque()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="data-prefetch") if self._ahead else None
        self._failure: BaseException | None = None
        self._closed = False

    @property
    def samples_consumed(self) -> int:
        """The place in the data order: all positions before it were read, or passed over; the only state."""
        return self._samples_consumed

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise StopIteration
        try:
            step = self._read_ahead() if self._threads else self._read(self._next_read_plans())
        except StopIteration:
            raise
        except BaseException as error:  # whatever it is, the steps after it must not be handed out
            self._failure = error
            raise
        self._reads += self.samples_per_step
        self._samples_consumed = int(self._skipped.positions(np.array(self._reads - 1))) + 1
        return step

    def close(self) -> None:
        """End the threads; the loader gives no more steps. It may be called twice."""
        self._closed = True
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._reading.clear()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _read_ahead(self) -> list[MicroBatch]:
        assert self._threads is not None
        while len(self._reading) < self._ahead:
            try:
                self._reading.append(self._threads.submit(self._read, self._next_read_plans()))
            except StopIteration:
                break
        if not self._reading:
            raise StopIteration
        step = self._reading[0].result()
        self._reading.popleft()
        # Not only at the next call: the threads would have nothing to do during the last step of computation.
        if self._has_next():
            self._reading.append(self._threads.submit(self._read, self._next_read_plans()))
        return step

    def _end(self) -> int | None:
        """Return how many reads there are in all, or None if they never end."""
        end = self._dataset.positions_total
        return None if end is None else self._skipped.reads_before(end)

    def _has_next(self) -> bool:
        end, start = self._end(), self._next_read - len(self._planned) * self.samples_per_step
        return end is None or start + self.samples_per_step <= end

    def _next_read_plans(self) -> Sequence[ReadPlan]:
        """Return the read plans of the next step's A micro-batches."""
        if not self._planned:
            steps, end = self._steps_at_once, self._end()
            if end is not None:
                steps = min(steps, (end - self._next_read) // self.samples_per_step)
                if steps < 1:
                    raise StopIteration
            starts = self._next_read + np.arange(steps, dtype=np.int64) * self.samples_per_step
            accumulation, size = self._positions_AB.shape
            positions = self._skipped.positions(starts[:, None, None] + self._positions_AB)
            indices = self._dataset.order(positions).reshape(-1)
            read_plans = self._dataset.read_plans(indices, [size] * (steps * accumulation))
            self._planned.extend(read_plans[i : i + accumulation] for i in range(0, len(read_plans), accumulation))
            places, pieces = _PLANNED_AT_ONCE
            found = sum(len(read_plan.reads_R4) for read_plan in read_plans)
            most = min(places // (accumulation * size * self._dataset.seq_len), pieces * steps // max(found, 1))
            self._steps_at_once = max(1, most)
            self._next_read += steps * self.samples_per_step
        return self._planned.popleft()


def validation_batches(
    dataset: Samples,
    *,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_samples: int | None = None,
    document_mask: bool = False,
) -> Iterator[MicroBatch]:
    """Yield micro-batches over a split, each sample on exactly one rank, once.

    Every rank gets the same number of micro-batches, all of B samples, so that collectives stay in step; samples beyond
    the last have labels -100 throughout.

    Args:
        dataset: What is read.
        micro_batch_size: Samples of a micro-batch, B.
        rank: This rank.
        world_size: Number of ranks.
        max_samples: How many samples are taken, evenly over the split and always the same ones; None takes all.
        document_mask: Give `document_ids` also where the packing does not need them.

    Raises:
        ValueError: An argument is out of its range.
    """
    _check_layout(micro_batch_size, 1, rank, world_size)
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples {max_samples}: must be at least 1")
    count = min(dataset.samples_per_epoch, max_samples or dataset.samples_per_epoch)
    # Neighbouring samples come from the same documents: the first ones would stand for a few texts only.
    chosen = np.arange(count, dtype=np.int64) * dataset.samples_per_epoch // count
    share = {"micro_batch_size": micro_batch_size, "rank": rank, "world_size": world_size}
    for consumed in range(0, count, micro_batch_size * world_size):
        (indices,) = step_positions(consumed, **share)
        batch = dataset.micro_batch(chosen[np.minimum(indices, count - 1)], document_mask)
        beyond = indices >= count
        if dataset.packing == "varlen":  # one row, its documents numbered as they were asked for
            beyond = beyond[batch["document_ids"]]
        batch["labels"][beyond] = IGNORED_LABEL
        yield {name: torch.from_numpy(array) for name, array in batch.items()}


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


def _read_step(
    dataset: Samples, document_mask: bool, pin_memory: bool, read_plans: Sequence[ReadPlan]
) -> list[MicroBatch]:
    step = []
    for read_plan in read_plans:
        batch = {name: torch.from_numpy(array) for name, array in dataset.fill(read_plan, document_mask).items()}
        step.append({name: tensor.pin_memory() for name, tensor in batch.items()} if pin_memory else batch)
    return step
