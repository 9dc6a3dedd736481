"""Step timing without waiting for the device, expert load, throughput and memory."""

import math
import mmap
import time

import pytest
import torch

from gptoss_dist.planner.flops import FlopCount
from gptoss_dist.planner.hardware import Peak
from gptoss_dist.tracking.metrics import (
    StepTimer,
    Throughput,
    exchange_metrics,
    expert_load,
    loss_metrics,
    memory_metrics,
)


def test_perplexity_is_capped_and_keeps_nan():
    assert loss_metrics("train", 2.0) == {"loss/train": 2.0, "loss/train_ppl": math.exp(2)}
    assert loss_metrics("val", 900.0)["loss/val_ppl"] == math.exp(20)
    assert loss_metrics("val", math.inf)["loss/val_ppl"] == math.exp(20)
    assert math.isnan(loss_metrics("train", math.nan)["loss/train_ppl"])


def test_cpu_timer_adds_repeated_phases():
    timer = StepTimer("cpu")
    timer.start()
    for _ in range(2):
        with timer.phase("data"):
            time.sleep(0.01)
        with timer.phase("compute"):
            time.sleep(0.03)
    with timer.phase("optimizer"):
        pass
    result = timer.stop()
    assert set(result) == {"perf/data_ms", "perf/compute_ms", "perf/optimizer_ms", "perf/step_ms"}
    assert result["perf/data_ms"] >= 20 and result["perf/compute_ms"] >= 60
    parts = result["perf/data_ms"] + result["perf/compute_ms"] + result["perf/optimizer_ms"]
    assert parts <= result["perf/step_ms"]
    timer.start()
    assert set(timer.stop()) == {"perf/step_ms"}, "nothing carries over into the next step"


def test_cuda_timer_reads_late_and_never_synchronizes(monkeypatch):
    device_clock = 0.0  # ms that the device has worked through
    recorded = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.at = None

        def record(self):
            self.at = 10.0 * (len(recorded) + 1)  # one event each 10 ms of device time
            recorded.append(self)

        def query(self):
            return self.at <= device_clock

        def elapsed_time(self, end):
            assert self.query() and end.query(), "read before the device got there"
            return end.at - self.at

        def synchronize(self):
            raise AssertionError("the host waited for the device")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", Event.synchronize)
    timer = StepTimer("cuda")

    def step():
        timer.start()
        with timer.phase("data"):
            pass
        for _ in range(2):
            with timer.phase("compute"):
                pass
        return timer.stop()

    assert step() == {}, "the device has not finished the first step"
    device_clock = 80.0  # the first step's eight events have passed
    assert step() == {"perf/data_ms": 10.0, "perf/compute_ms": 20.0, "perf/step_ms": 70.0}
    assert step() == {}
    device_clock = 1e9
    assert step()["perf/step_ms"] == 70.0
    assert len(timer._pending) == 0, "late steps are dropped rather than piled up"


def test_expert_load_against_hand_numbers():
    counts_LE = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [0, 0, 0, 0]])
    load = expert_load(counts_LE, torch.tensor([math.log(4), 0.0, 0.0]))
    assert [load[f"moe/load_cv/layer_{i}"] for i in range(3)] == pytest.approx([0, math.sqrt(3), 0])
    assert [load[f"moe/load_max_over_mean/layer_{i}"] for i in range(3)] == [1, 4, 0]
    assert [load[f"moe/dead_experts/layer_{i}"] for i in range(3)] == [0, 3, 4]
    assert load["moe/entropy/layer_0"] == pytest.approx(math.log(4))
    assert load["moe/load_cv"] == pytest.approx(math.sqrt(3) / 3)
    assert (load["moe/load_max_over_mean"], load["moe/dead_experts"]) == (4, 7)
    assert load["moe/router_entropy"] == pytest.approx(math.log(4) / 3)
    assert not any("entropy" in name for name in expert_load(counts_LE))
    with pytest.raises(ValueError, match=r"\[L, E\]"):
        expert_load(counts_LE[0])


def test_exchange_metrics_against_hand_numbers():
    traffic_R3 = torch.tensor([[30.0, 2**30, 0.010], [10.0, 2**29, 0.030]])
    metrics = exchange_metrics(traffic_R3)
    assert metrics == {
        "moe/rank_rows_max_over_mean": 1.5,
        "perf/all_to_all_gib": 1.5,
        "perf/all_to_all_ms": pytest.approx(20.0),
    }
    assert exchange_metrics(torch.zeros(4, 3))["moe/rank_rows_max_over_mean"] == 1.0
    for shape in ((3,), (2, 2), (0, 3)):
        with pytest.raises(ValueError, match=r"traffic \[R, 3\]"):
            exchange_metrics(torch.zeros(shape))


def test_throughput_is_by_the_steps_own_time():
    flops, peak = FlopCount(0, 0, 0, 1e6, 0, 0), Peak(1.2e10, "test", "test")
    meter = Throughput(2, tokens=500, flops=flops, peak=peak)
    metrics = meter.step(4000, {"perf/step_ms": 500.0, "perf/data_ms": 100.0})
    assert metrics["progress/tokens"] == 4500
    assert metrics["perf/tokens_per_s"] == pytest.approx(8000)
    assert metrics["perf/tokens_per_s_per_device"] == pytest.approx(4000)
    assert metrics["perf/mfu"] == pytest.approx(1.0)
    assert meter.step(4000, {}) == {"progress/tokens": 8500}, "on CUDA the first steps have no time yet"
    assert "perf/mfu" not in Throughput(1, flops=flops).step(10, {"perf/step_ms": 1.0})


def test_memory_sees_an_allocation():
    before = memory_metrics("cpu")
    # 0.25 GiB from the system, touched. Not a tensor's: training keeps freed memory, and other tests may leave some.
    block = mmap.mmap(-1, 2**28, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for _ in range(2**8):
        block.write(bytes(2**20))
    after = memory_metrics("cpu")
    assert after["perf/memory_rss_gib"] - before["perf/memory_rss_gib"] == pytest.approx(0.25, abs=0.02)
    block.close()
    assert after["perf/memory_peak_rss_gib"] >= 0.99 * after["perf/memory_rss_gib"]


def test_a_utilisation_that_cannot_be_true_is_not_reported():
    def peak(value):
        return Peak(value, "measured", "test")

    def step(throughput, tokens_per_s):
        return throughput.step(tokens_per_s, {"perf/step_ms": 1000.0}).get("perf/mfu")

    flops = FlopCount(0, 0, 0, 1.0, 0, 0)
    datasheet = Throughput(1, flops=flops, peak=peak(30.0))
    assert [step(datasheet, rate) for rate in (5, 10, 11)] == [0.5, 1.0, None]

    # Something else used the machine when the peak was measured: it is measured again, and only then.
    later = iter([peak(20.0), peak(45.0), peak(90.0)])
    measured = Throughput(1, flops=flops, peak=peak(30.0), measure_peak=lambda: next(later))
    assert step(measured, 5) == 0.5
    assert step(measured, 11) is None, "the machine is busy still"
    assert step(measured, 15) == 1.0 and measured.peak.value == 45.0
    assert step(measured, 16) is None, "not at every step"
    assert step(measured, 20) == pytest.approx(60 / 90)
    measurements = []
    never = Throughput(1, flops=flops, peak=peak(1.0), measure_peak=lambda: measurements.append(1))
    assert {step(never, 5) for _ in range(10_000)} == {None} and len(measurements) == 13
