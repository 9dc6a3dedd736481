"""Saving beside the training: a step waits only until its tensors have been copied to host memory."""

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
from gptoss_dist.checkpoint.store import Parts, Retention, write
from gptoss_dist.distributed.collectives import long_timeout_group

RETRY_AFTER_S = (1.0, 5.0)
"""Waits before a failed save is tried again."""


class Saver:
    """A writer of a run's checkpoints, one at a time. All ranks call the same methods in the same order.

    A save that fails is tried again, then given up until the next one; `messages` reports it. Training goes on
    meanwhile and earlier checkpoints stay as they are.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: Retention,
        asynchronous: bool,
        group: dist.ProcessGroup | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Prepare to save; collective.

        Args:
            folder: The run's checkpoint folder.
            keep: The rule by which older checkpoints are deleted.
            asynchronous: Write in a thread, from a copy of the state in host memory (pinned if it comes from a GPU).
                The copy needs room for what the rank holds of weights and optimizer state.
            group: A group of all ranks that nobody else uses as long as this saves. Without one, one is made.
            check: That of `write`.
        """
        self.folder, self.keep, self.asynchronous = Path(folder), keep, asynchronous
        # The thread's collectives must not meet those of the training on the way.
        self.group = group or long_timeout_group()
        self.check = check
        self.error: OSError | None = None
        """The error of the newest save, if that failed for good."""
        self.pause_s = 0.0
        """How long the last call of `save` took, in seconds."""
        self.seconds = 0.0
        """How long it took to write the last checkpoint, in seconds."""
        self._thread: threading.Thread | None = None
        self._broken: BaseException | None = None
        self._copies: dict[tuple[str, int], Tensor] = {}
        self._messages: list[str] = []

    def save(
        self, step: int, state: dict[str, Tensor], info: dict, *, extra_files: Callable[[Path], None] | None = None
    ) -> None:
        """Save the state that step `step` ended with. It waits for the save before it.

        Args:
            step: Optimizer steps done.
            state: Tensors by name, as an engine's `state()` has them.
            info: JSON values to store with them; of a training run, `CheckpointInfo.to_json`.
            extra_files: Called on rank 0 with the unfinished directory, to add files to it.
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
        """Wait until nothing is being written.

        Raises:
            BaseException: Whatever ended the thread, except a failure to write.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._broken is not None:
            raise self._broken

    def messages(self) -> list[str]:
        """Return what went wrong since the last call, in lines for the user.

        Raises:
            BaseException: Whatever ended the thread, except a failure to write.
        """
        if self._broken is not None:
            self.wait()
        messages, self._messages = self._messages, []
        return messages

    def close(self) -> None:
        """Wait for the last save.

        Raises:
            OSError: The last save failed.
        """
        self.wait()
        if self.error is not None:
            raise self.error

    def _parts(self, state: dict[str, Tensor]) -> Parts:
        """Return what this rank writes of `state`, copied if the training goes on meanwhile or it is on a GPU."""
        parts = {}
        for name, tensor in state.items():
            boxes = boxes_to_write(name, tensor)
            if self.asynchronous or any(values.device.type != "cpu" for _, values in boxes):
                boxes = [Box(offset, self._copy((name, i), values)) for i, (offset, values) in enumerate(boxes)]
            parts[name] = (tuple(tensor.shape), boxes)
        return parts

    def _copy(self, key: tuple[str, int], values: Tensor) -> Tensor:
        """Copy `values` to memory that all saves use, which is pinned where that helps."""
        copy = self._copies.get(key)
        if copy is None or copy.shape != values.shape:
            pinned = values.is_cuda
            copy = self._copies[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
        return copy.copy_(values, non_blocking=self.asynchronous)

    def _write(
        self, step: int, parts: Parts, info: dict, rng: dict, extra_files: Callable[[Path], None] | None
    ) -> None:
        """Write a checkpoint, and again if that fails, after each of the waits in `RETRY_AFTER_S`."""
        for wait_s in (*RETRY_AFTER_S, None):
            try:
                write(
                    self.folder,
                    step,
                    parts,
                    info,
                    rng,
                    keep=self.keep,
                    extra_files=extra_files,
                    check=self.check,
                    group=self.group,
                )
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
        OSError: It cannot be written.
    """
    saver = Saver(folder, keep=keep or Retention(), asynchronous=False)
    saver.save(step, state, info)
    saver.close()
    return saver.folder / f"step_{step:08d}"
