"""What machines do, measured on each node and sent by rank 0."""

import json
import sys
import time
from types import SimpleNamespace

import pytest

from gptoss_dist.tracking.delivery import system_metrics
from gptoss_dist.tracking.delivery.environment import Wishes
from gptoss_dist.tracking.delivery.system_metrics import NodeMonitor
from gptoss_dist.tracking.tracker import sync
from tests.support.tracked import history, runs_of, start

KEY = "system/n1/cpu_utilization_percentage"


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def samples(run_dir):
    lines = [line for path in sorted((run_dir / "tracking/system").glob("*")) for line in path.open()]
    return [json.loads(line) for line in lines]


def test_names_are_those_of_mlflow(tmp_path):
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    theirs = set()
    for monitor in (CPUMonitor(), DiskMonitor(), NetworkMonitor()):
        monitor.collect_metrics()
        theirs |= set(monitor.aggregate_metrics())
    ours = system_metrics.Meters(tmp_path).read()
    assert set(ours) == theirs
    assert 0 < ours["system_memory_usage_percentage"] < 100 and ours["disk_available_megabytes"] > 0


def test_gpus_are_measured_one_by_one_and_what_one_cannot_tell_is_left_out(tmp_path, monkeypatch):
    class NVMLError(Exception):
        pass

    def watts(gpu):
        if gpu == 1:
            raise NVMLError
        return 350_000

    monkeypatch.setitem(
        sys.modules,
        "pynvml",
        SimpleNamespace(
            NVMLError=NVMLError,
            nvmlInit=lambda: None,
            nvmlDeviceGetCount=lambda: 2,
            nvmlDeviceGetHandleByIndex=int,
            nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=20e9, total=80e9),
            nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=97 - gpu),
            nvmlDeviceGetPowerUsage=watts,
            nvmlDeviceGetEnforcedPowerLimit=lambda gpu: 700_000,
        ),
    )
    values = system_metrics.Meters(tmp_path).read()
    assert {key: value for key, value in values.items() if key.startswith("gpu_0")} == {
        "gpu_0_memory_usage_megabytes": 20000.0,
        "gpu_0_memory_usage_percentage": 25.0,
        "gpu_0_utilization_percentage": 97.0,
        "gpu_0_power_usage_watts": 350.0,
        "gpu_0_power_usage_percentage": 50.0,
    }
    assert values["gpu_1_utilization_percentage"] == 96.0 and "gpu_1_power_usage_watts" not in values


def test_a_node_goes_on_counting_where_it_or_another_one_stopped(tmp_path, monkeypatch):
    """A run that was resumed on another machine has the same keys there."""
    for host in ("b", "b", "a"):
        monkeypatch.setattr(system_metrics, "this_host", lambda host=host: host)
        before = len(samples(tmp_path))
        monitor = NodeMonitor(tmp_path, 0.02, "n1", pytest.fail)
        wait_for(lambda before=before: len(samples(tmp_path)) > before + 2)
        monitor.close()
    assert sorted(line["step"] for line in samples(tmp_path)) == list(range(len(samples(tmp_path))))
    assert all(key.startswith("system/n1/") for key in samples(tmp_path)[0]["metrics"])


def test_without_a_shared_folder_nothing_is_made(tmp_path):
    said = []
    monitor = NodeMonitor(tmp_path / "elsewhere", 0.01, "n1", said.append)
    wait_for(lambda: not monitor.is_measuring)
    monitor.close()
    assert not (tmp_path / "elsewhere").exists() and not said


def test_what_stops_a_monitor_is_told_once(tmp_path, monkeypatch):
    monkeypatch.setattr(system_metrics.psutil, "virtual_memory", lambda: 1 / 0)
    said = []
    monitor = NodeMonitor(tmp_path, 0.01, None, said.append)
    wait_for(lambda: not monitor.is_measuring)
    monitor.close()
    assert len(said) == 1 and "ZeroDivisionError" in said[0]


def test_files_of_all_nodes_arrive_once_and_torn_lines_later(tmp_path, client, store):
    run_dir = tmp_path / "run"
    folder = run_dir / "tracking" / "system"
    tracker = start(run_dir, enabled=False)
    tracker.close()
    folder.mkdir()
    line = {"time": 1.7e9, "metrics": {KEY: 50.0}}
    whole = "".join(json.dumps(line | {"step": step}) + "\n" for step in range(40))
    (folder / "n1.jsonl").write_text(whole + "nonsense\n" + '{"step": 40, "time": 1.7e9, "metr')
    (folder / "n2.jsonl").write_text(whole.replace("n1", "n2"))
    for _ in range(2):
        sync(run_dir)
    with (folder / "n1.jsonl").open("a") as file:
        file.write(f'ics": {{"{KEY}": 51.0}}}}\n')
    run_id = sync(run_dir)
    assert history(client, run_id, KEY) == [*((step, 50.0) for step in range(40)), (40, 51.0)]
    assert len(history(client, run_id, KEY.replace("n1", "n2"))) == 40

    # A node's file that was replaced by a shorter one is sent anew; what MLflow has it keeps once.
    (folder / "n2.jsonl").write_text(whole.replace("n1", "n2")[: len(whole) // 2])
    assert sync(run_dir) == run_id
    assert len(history(client, run_id, KEY.replace("n1", "n2"))) == 40


def test_a_run_measures_its_node_by_default_settings_of_its_own(tmp_path, client, store, monkeypatch):
    tracker = start(tmp_path / "run", system_metrics_every_s=0.05, node="n1")
    wait_for(lambda: len(samples(tmp_path / "run")) > 1)
    tracker.close()
    (run,) = runs_of(client)
    assert KEY in run.data.metrics
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    tracker = start(tmp_path / "off", system_metrics_every_s=0.05)
    tracker.close()
    assert not samples(tmp_path / "off") and samples(tmp_path / "run")


@pytest.mark.parametrize(
    ("enabled", "interval", "every_s", "told"),
    [
        (None, None, None, 0),
        ("true", None, 10.0, 0),
        ("1", "2.5", 2.5, 0),
        ("false", "2.5", 0.0, 0),
        (None, "7", 7.0, 0),
        ("true", "often", 10.0, 1),
        ("true", "-1", 10.0, 1),
        ("perhaps", None, None, 1),
    ],
)
def test_variables_of_mlflow_come_first(monkeypatch, enabled, interval, every_s, told):
    for name, value in (("ENABLE_SYSTEM_METRICS_LOGGING", enabled), ("SYSTEM_METRICS_SAMPLING_INTERVAL", interval)):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)
        if value is not None:
            monkeypatch.setenv(f"MLFLOW_{name}", value)
    said = []
    assert Wishes.read(said.append).system_metrics_every_s == every_s and len(said) == told
