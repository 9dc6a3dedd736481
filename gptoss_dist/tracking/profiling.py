"""One step under torch.profiler."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


@contextmanager
def profiled(folder: Path, step: int, device: torch.device) -> Iterator[None]:
    """Record what is enclosed with torch.profiler, in two files in `folder`.

    `kernels_STEP.txt` lists operators and kernels by their own time on the device (on the host where there is no GPU);
    `trace_STEP.json` is for chrome://tracing or ui.perfetto.dev. The end waits for the device: the recorded step is
    slower than others, and so is the next. Files that cannot be written cost the record, not the run.
    """
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profile:
        yield
        if cuda:
            torch.cuda.synchronize(device)
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    try:
        folder.mkdir(exist_ok=True)
        table = profile.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
        (folder / f"kernels_{step:08d}.txt").write_text(table + "\n", encoding="utf-8")
        profile.export_chrome_trace(str(folder / f"trace_{step:08d}.json"))
    except Exception as error:
        logger.warning("the profile of step %s is not written: %s", step, error)
