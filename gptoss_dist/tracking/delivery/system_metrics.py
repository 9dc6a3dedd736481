"""What the machines of a run do: processor, memory, disk, network and GPUs of each node, under MLflow's own names.

One process of each node measures and writes `tracking/system/HOST.jsonl` in the run's folder, lines like those of
`metrics.jsonl` whose step is the number of the sample. Rank 0 sends these files, those of other nodes too where they
share the folder. mlflow is not imported, which would cost every node seconds and a hundred megabytes.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from gptoss_dist.distributed.hosts import this_host
from gptoss_dist.tracking.delivery.environment import Wishes
from gptoss_dist.tracking.jsonl import JsonLinesWriter, read_lines
from gptoss_dist.tracking.records import SYSTEM_FOLDER, metrics_line

logger = logging.getLogger(__name__)

_FIRST_S = 1.0
_MB = 1e6


class NodeMonitor:
    """A thread that measures this node until it is closed. What goes wrong with that is told once, and ends only it.

    Args:
        run_dir: Folder of the run. Nothing is measured where it is not there: a node that does not share it.
        every_s: Seconds between samples; 0 measures nothing.
        node: The node's name in the metrics, `system/NODE/...`; None for a run of one node, `system/...`.
        message: What tells the user.
    """

    def __init__(
        self, run_dir: Path, every_s: float, node: str | None, message: Callable[[str], None] = logger.warning
    ) -> None:
        self._run_dir, self._every_s, self._message = run_dir, every_s, message
        self._prefix = f"system/{node}/" if node else "system/"
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if every_s > 0:
            self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
            self._thread.start()

    @property
    def is_measuring(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Stop to measure."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(2.0)

    def _work(self) -> None:
        try:
            self._measure()
        except Exception as error:
            self._message(f"system metrics of {this_host()} are not recorded any more: {type(error).__name__}: {error}")

    def _measure(self) -> None:
        meters, writer, step = Meters(self._run_dir), None, 0
        pause = min(_FIRST_S, self._every_s)
        while not self._closing.wait(pause):
            pause = self._every_s
            if not self._run_dir.is_dir():
                return
            values = {f"{self._prefix}{key}": value for key, value in meters.read().items()}
            if writer is None:
                path = self._run_dir / SYSTEM_FOLDER / f"{_file_name(this_host())}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                step = _next_sample(path.parent)
                writer = JsonLinesWriter(path, self._message)
            writer.append(metrics_line(step, round(time.time(), 3), values))
            step += 1
        if writer is not None:
            writer.close()


def monitor_this_node(
    run_dir: Path, every_s: float, wishes: Wishes, node: str | None, message: Callable[[str], None]
) -> NodeMonitor:
    """Return a monitor of this machine as the settings ask for, unless MLflow's variables say otherwise."""
    wished = wishes.system_metrics_every_s
    return NodeMonitor(run_dir, every_s if wished is None else wished, wishes.node or node, message)


class Meters:
    """What is read in each sample.

    The utilisation of processors is that since the sample before; traffic is counted from when this was made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._gpus, self._nvml = _gpus()
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()

    def read(self) -> dict[str, float]:
        """Return a sample under MLflow's names."""
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(str(self._folder)), psutil.net_io_counters()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MB,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / _MB,
            "disk_available_megabytes": disk.free / _MB,
        }
        if network is not None and self._network is not None:
            values["network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / _MB
            values["network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / _MB
        for number, gpu in enumerate(self._gpus):
            values |= {f"gpu_{number}_{key}": value for key, value in self._read_gpu(gpu).items()}
        return {key: round(value, 1) for key, value in values.items()}

    def _read_gpu(self, gpu: Any) -> dict[str, float]:
        nvml, values = self._nvml, {}
        with contextlib.suppress(nvml.NVMLError):
            memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
            values["memory_usage_megabytes"] = memory.used / _MB
            values["memory_usage_percentage"] = 100 * memory.used / memory.total
        with contextlib.suppress(nvml.NVMLError):
            values["utilization_percentage"] = float(nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
        with contextlib.suppress(nvml.NVMLError):
            watts = nvml.nvmlDeviceGetPowerUsage(gpu) / 1000
            values["power_usage_watts"] = watts
            values["power_usage_percentage"] = 1e5 * watts / nvml.nvmlDeviceGetEnforcedPowerLimit(gpu)
        return values


def _gpus() -> tuple[list[Any], Any]:
    """Return NVML's handles of this node's GPUs, and NVML; no handles where there are none, or no `nvidia-ml-py`."""
    try:
        pynvml = importlib.import_module("pynvml")  # its package is optional
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())], pynvml
    except Exception:
        return [], None


def _next_sample(folder: Path) -> int:
    """Return the number of the next sample, above those of earlier processes, which other machines may have had."""
    last = -1
    for path in folder.glob("*.jsonl"):
        for line, _ in read_lines(path):
            step = line.get("step")
            last = step if isinstance(step, int) and step > last else last
    return last + 1


def _file_name(host: str) -> str:
    return re.sub(r"[^\w.-]", "_", host)[:100]
