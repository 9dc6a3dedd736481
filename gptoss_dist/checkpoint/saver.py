"""Saving beside the training: a step waits only until its tensors are copied to host memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from gptoss_dist.checkpoint.boxes import Box, boxes_to_write
from gptoss_dist.checkpoint.rng import rng_state
from gptoss_dist.checkpoint.store import Retention, write
from gptoss_dist.distributed.collectives import long_timeout_group

RETRY_AFTER_S = (1.0, 5.0)
"""Waits before a failed save is tried again."""


class Saver:
    """Writes a run's checkpoints, one at a time. All ranks call the same methods in the same order.

    A save that fails is said by `messages`, tried again, and given up until the next one; training goes on meanwhile
    and earlier checkpoints stay as they are.
    """

    def __init__(
        self, folder: str | Path, *, keep: Retention, asynchronous: bool, group: dist.ProcessGroup | None = None
    ) -> None:
        """
        Args:
            asynchronous: write in a thread, from a copy of the state in host memory (pinned if it comes from a GPU).
                Needs room for what the rank holds of weights and optimizer state.
            group: of all ranks, used by nobody else as long as this saves; without one it makes one.
        """
        self.folder, self.keep, self.asynchronous = Path(folder), keep, asynchronous
        # The thread's collectives must not meet those of the training on the way.
        self.group = group or long_timeout_group()
        self.error: OSError | None = None
        """Of the newest save, if that failed for good."""
        self.pause_s = 0.0
        """How long the last call of `save` took."""
        self.seconds = 0.0
        """How long it took to write the last checkpoint."""
        self._thread: threading.Thread | None = None
        self._broken: BaseException | None = None
        self._copies: dict[tuple[str, int], Tensor] = {}
        self._messages: list[str] = []

    def save(
        self, step: int, state: dict[str, Tensor], info: dict, *, extra_files: Callable[[Path], None] | None = None
    ) -> None:
        """Save the state of after step `step`; waits for the save before it.

        Args:
            state: tensors by name, as an engine's `state()` has them.
            info: JSON values stored with them.
            extra_files: called on rank 0 with the unfinished directory, to add files to it.
        """
        start = time.perf_counter()
        self.wait()
        parts, copied = self._parts(state), None
        if self.asynchronous and any(t.is_cuda for t in state.values()):
            copied, device = torch.cuda.Event(), torch.cuda.current_device()
            copied.record()
        rng = rng_state()
        self.error = None

        def work() -> None:
            began = time.perf_counter()
            try:
                if copied is not None:
                    torch.cuda.set_device(device)  # a new thread has the first one
                    copied.synchronize()
                self._write(step, parts, info, rng, extra_files)
            except BaseException as error:
                self._broken = error
            self.seconds = time.perf_counter() - began

        if self.asynchronous:
            self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            work()
            self.wait()
        self.pause_s = time.perf_counter() - start

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            whatever ended the thread, a failure to write excepted.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._broken is not None:
            raise self._broken

    def messages(self) -> list[str]:
        """What went wrong since the last call, for the user.

        Raises:
            whatever ended the thread, a failure to write excepted.
        """
        if self._broken is not None:
            self.wait()
        said, self._messages = self._messages, []
        return said

    def close(self) -> None:
        """Wait for the last save.

        Raises:
            OSError: it failed.
        """
        self.wait()
        if self.error is not None:
            raise self.error

    def _parts(self, state: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], list[Box]]]:
        parts = {}
        for name, tensor in state.items():
            boxes = boxes_to_write(name, tensor)
            if self.asynchronous or any(values.device.type != "cpu" for _, values in boxes):
                boxes = [Box(offset, self._copy((name, i), values)) for i, (offset, values) in enumerate(boxes)]
            parts[name] = (tuple(tensor.shape), boxes)
        return parts

    def _copy(self, key: tuple[str, int], values: Tensor) -> Tensor:
        """Into memory that all saves use, pinned where that helps."""
        copy = self._copies.get(key)
        if copy is None or copy.shape != values.shape:
            pinned = values.is_cuda
            copy = self._copies[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
        return copy.copy_(values, non_blocking=self.asynchronous)

    def _write(self, step: int, parts: dict, info: dict, rng: dict, extra_files) -> None:
        for wait_s in (*RETRY_AFTER_S, None):
            try:
                write(
                    self.folder, step, parts, info, rng, keep=self.keep, extra_files=extra_files, group=self.group
                )  # fmt: skip
                return
            except OSError as error:  # the same on all ranks
                again = f"trying again in {wait_s:g} s" if wait_s else "training goes on without it"
                self._messages.append(f"{error}; earlier checkpoints are intact; {again}")
                if wait_s is None:
                    self.error = error
                else:
                    time.sleep(wait_s)


def save(folder: str | Path, step: int, state: dict[str, Tensor], info: dict, *, keep: Retention | None = None) -> Path:
    """Save `state` and wait until the disk has it; collective.

    Returns:
        The new directory.

    Raises:
        OSError: it cannot be written.
    """
    saver = Saver(folder, keep=keep or Retention(), asynchronous=False)
    saver.save(step, state, info)
    saver.close()
    return saver.folder / f"step_{step:08d}"
