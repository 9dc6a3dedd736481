"""Moving rows between the processes of a group, of expert or context parallelism, and what that costs.

Shapes: R processes of the group, M rows, D width of a row.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptoss_dist.parallel.recompute import once


class Cost(NamedTuple):
    """What one process's all-to-alls cost."""

    rows: int
    """Token copies that its experts were sent, its own included; recomputation does not count again."""
    bytes: int
    """Bytes that it sent to other processes; recomputation and gradients count."""
    seconds: float
    """Time in all-to-alls, waiting for slower processes included. On CUDA it is the device's time, and only of those
    that have finished: the rest counts into the next `take`."""


class Exchange:
    """The all-to-alls of one process, for all layers of a model."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.size = group, dist.get_world_size(group)
        self._rank, self._cuda = dist.get_rank(group), device.type == "cuda"
        self.counting = True
        """Off while the model validates or writes samples: `take` is about training."""
        self._rows = self._bytes = 0
        self._seconds = 0.0
        self._spans: deque[tuple] = deque()

    def counts(self, sent_RE: Tensor) -> tuple[list[list[int]], Tensor]:
        """Tell every process how many rows it will get for each of its experts.

        This is the only place where the host waits for the device. It is not repeated when activations are recomputed.

        Args:
            sent_RE: Rows for expert e of process r, integers [R, E local].

        Returns:
            `sent, received` as totals per process on the host, and received_RE on the device: rows from process r for
            this process's expert e.
        """
        return once(lambda: self._counts(sent_RE))

    def _counts(self, sent_RE: Tensor) -> tuple[list[list[int]], Tensor]:
        received_RE = torch.empty_like(sent_RE)
        with self._timed():
            dist.all_to_all_single(received_RE, sent_RE, group=self.group)
        totals = torch.stack([sent_RE.sum(1), received_RE.sum(1)]).tolist()
        self._rows += self.counting * sum(totals[1])
        self._bytes += self.counting * (self.size - 1) * sent_RE[0].numel() * sent_RE.element_size()
        return totals, received_RE

    def rows(self, x_MD: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send `sent[r]` consecutive rows to process r and get `received[r]` from it; differentiable; collective."""
        return _AllToAll.apply(x_MD, sent, received, self)

    def move(self, x_MD: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Do as `rows`, without a gradient."""
        y_MD = x_MD.new_empty(sum(received), *x_MD.shape[1:])
        with self._timed():
            dist.all_to_all_single(y_MD, x_MD.contiguous(), received, sent, group=self.group)
        row_bytes = x_MD[:1].numel() * x_MD.element_size() if sum(sent) else 0
        self._bytes += self.counting * (sum(sent) - sent[self._rank]) * row_bytes
        return y_MD

    def take(self) -> Cost:
        """Return the cost since the last call."""
        while self._spans and self._spans[0][1].query():
            begin, end = self._spans.popleft()
            self._seconds += 1e-3 * begin.elapsed_time(end)
        cost = Cost(self._rows, self._bytes, self._seconds)
        self._rows, self._bytes, self._seconds = 0, 0, 0.0
        return cost

    @contextmanager
    def _timed(self) -> Iterator[None]:
        if not self.counting:
            yield
        elif self._cuda:
            span = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            span[0].record()
            yield
            span[1].record()
            self._spans.append(span)
        else:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD: Tensor, sent: list[int], received: list[int], exchange: Exchange) -> Tensor:
        ctx.sent, ctx.received, ctx.exchange = sent, received, exchange
        # Autograd writes the graph's node into the tensor returned here; what is kept shares its memory only.
        return once(lambda: exchange.move(x_MD, sent, received), large=True).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_MD: Tensor):
        return ctx.exchange.move(dy_MD, ctx.received, ctx.sent), None, None, None
