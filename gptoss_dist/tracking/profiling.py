"""One step under torch.profiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def profiled(folder: Path, step: int, device: torch.device) -> Iterator[None]:
    """Record what is enclosed with torch.profiler, in two files in `folder`.

    `kernels_STEP.txt` lists operators and kernels by their own time on the device (on the host where there is no GPU);
    `trace_STEP.json` is for chrome://tracing or ui.perfetto.dev. The end waits for the device: the recorded step is
    slower than others, and so is the next.

    Raises:
        OSError: The folder cannot be written.
    """
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profile:
        yield
        if cuda:
            torch.cuda.synchronize(device)
    folder.mkdir(exist_ok=True)
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
    (folder / f"kernels_{step:08d}.txt").write_text(table + "\n")
    profile.export_chrome_trace(str(folder / f"trace_{step:08d}.json"))
