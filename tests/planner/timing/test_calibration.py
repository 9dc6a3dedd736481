"""A measured machine survives its file, is interpolated as the page says, and prices what it measured."""

import dataclasses
import math

import pytest
import torch
import yaml

from gptoss_dist.engine import EngineSettings
from gptoss_dist.planner.timing.calibrate import Meter, Sizes, calibrate, measure_products
from gptoss_dist.planner.timing.calibration import (
    Attention,
    Calibration,
    Curve,
    read_calibration,
    write_calibration,
)
from gptoss_dist.planner.timing.steps import TINY, measure_steps, predict_step
from gptoss_dist.planner.tracing.recorder import Operator
from gptoss_dist.train.objectives import next_token_prediction

FLAT = Curve([1.0], [1e9])


def machine(**fields) -> Calibration:
    curves = {64: Curve([128.0, 512.0], [1e9, 4e9]), 256: Curve([512.0], [1.6e10])}
    given = {
        "name": "test",
        "device": "cpu",
        "date": "2026-11-29",
        "torch_version": "2.13",
        "threads": 1,
        "operator_s": 1e-5,
        "sync_s": 1e-6,
        "products": {"float32": curves},
        "grouped": {},
        "attention": {"float32": Attention({64: FLAT}, {64: FLAT}, {64: Curve([1.0], [5e8])}, {64: FLAT})},
        **dict.fromkeys(("memory", "rows", "exponentials", "sorts", "optimizer"), FLAT),
        "collectives": {"all-gather": Curve([1e3, 1e5], [1e6, 1e8])},
    }
    return Calibration(**(given | fields))


def test_rates_are_interpolated_in_logarithms_and_stay_beyond_the_ends():
    curve = Curve([10.0, 1000.0], [1.0, 100.0])
    assert [curve.at(size) for size in (1, 10, 100, 1000, 1e6)] == pytest.approx([1, 1, 10, 100, 100])
    product = Operator("aten.mm.default", "forward", 10**9, 0, 0, torch.float32, ((64, 256), (256, 256)), (), ())
    assert machine().compute_s(product) == pytest.approx(1e9 / 2e9 + 1e-5), "between 1e9 and 4e9"
    between = product._replace(shapes=((128, 512), (512, 512)))
    assert machine().compute_s(between) == pytest.approx(1e9 / 8e9 + 1e-5), "between 4e9 and 1.6e10"
    biased = product._replace(name="aten.addmm.default", shapes=((256,), (64, 256), (256, 256)))
    into_out = product._replace(name="aten.mm.out", shapes=((64, 256), (256, 256), (64, 256)))
    added = product._replace(name="aten.addmm_.default", shapes=((64, 256), (64, 256), (256, 256)))
    assert machine().compute_s(biased) == machine().compute_s(into_out) == machine().compute_s(product)
    assert machine().compute_s(added) == machine().compute_s(product)


def test_a_window_has_rates_of_its_own():
    tokens, window = 512, 128
    for pairs, rate in ((tokens * (tokens + 1) // 2, 1e9), (window * tokens - window * (window - 1) // 2, 5e8)):
        flops = 4 * 2 * 64 * pairs
        shapes = ((1, tokens, 2, 64), (1, tokens, 1, 64), (1, tokens, 1, 64), (2,))
        attention = Operator(
            "gptoss_dist.sink_attention.default", "forward", flops, 0, 0, torch.float32, shapes, (), ()
        )
        assert machine(operator_s=0.0).compute_s(attention) == pytest.approx(flops / rate)


def test_collectives_take_what_was_measured_and_say_so_where_nothing_was():
    assert machine().link_s("all-gather", 1e4, 2) == pytest.approx(1e4 / 1e7)
    assert machine().link_s("broadcast", 1e4, 2) == pytest.approx(1e4 / 1e7)
    assert machine().link_s("all-gather", 1e4, 1) == 0
    with pytest.raises(ValueError, match=r"collectives.all-to-all of hardware 'test' was not measured; measure anew"):
        machine(collectives={}).link_s("all-to-all", 1e4, 2)


def test_a_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "hardware/test.yaml"
    write_calibration(machine(), path)
    assert read_calibration(path) == machine()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": "two"}, r"threads.*int"),
        ({"threads": 0}, "threads at least 1"),
        ({"memory": {"sizes": [2.0, 1.0], "values": [1.0, 1.0]}}, r"memory.sizes=\[2.0, 1.0\] must ascend"),
        ({"memory": {"sizes": [1.0], "values": [0.0]}}, "memory must have sizes and values above 0"),
        ({"memory": {"sizes": [1.0], "values": [math.inf]}}, "memory"),
        ({"products": {}}, "products and attention must have a dtype each"),
        ({"rows": None}, "rows"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, change, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(machine()) | change))
    with pytest.raises(ValueError, match=message) as error:
        read_calibration(path)
    assert "\n" not in str(error.value) and "wrong.yaml" in str(error.value)
    assert "measure anew" in str(error.value)


def test_a_product_is_priced_at_what_it_was_measured():
    meter = Meter(torch.device("cpu"), budget_s=0.02)
    products = measure_products(meter, Sizes(smallest=(64,), others=(128, 256)), torch.float32)
    a, b = torch.randn(256, 64), torch.randn(64, 256)
    operator = Operator(
        "aten.mm.default", "forward", 2 * 256 * 256 * 64, 0, 0, torch.float32, ((256, 64), (64, 256)), (), ()
    )
    priced = machine(products={"float32": products}, operator_s=0.0, memory=Curve([1.0], [1e15])).compute_s(operator)
    assert 1 / 3 < priced / meter.seconds(lambda: a @ b) < 3


@pytest.mark.distributed
def test_this_machine_is_measured_and_predicts_a_tiny_step(tmp_path):
    """The sizes are few, so the rates are rough; what is measured fits the file and the trace."""
    threads = torch.get_num_threads()
    sizes = Sizes(
        smallest=(8, 64), others=(128,), tokens=(64,), head_dims=(32,), heads=2, numbers=(4096,) * 1 + (8192,)
    )
    measured = calibrate(next_token_prediction, "cpu", "tiny", sizes=dataclasses.replace(sizes, messages=(1 << 12,)))
    assert set(measured.collectives) == {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}
    assert 1e-6 < measured.operator_s < 1e-2 and measured.threads == threads
    write_calibration(measured, tmp_path / "tiny.yaml")
    step = predict_step(EngineSettings(TINY), 32, next_token_prediction, read_calibration(tmp_path / "tiny.yaml"))
    assert 0 < step.seconds < 60 and step.by_kind["matrix products"] > 0


@pytest.mark.slow
def test_steps_of_this_machine_are_predicted_within_40_percent():
    from launch.benchmarks.plan import CASES, settings_of

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calibration = calibrate(next_token_prediction)
    finally:
        torch.set_num_threads(threads)
    for case in (CASES[1], CASES[2]):
        settings = settings_of(case)
        predicted = predict_step(settings, case.seq_len, next_token_prediction, calibration)
        measured = measure_steps(settings, case.seq_len, next_token_prediction, torch.device("cpu"), 1)
        assert measured.seconds(1) == pytest.approx(predicted.seconds, rel=0.4), case
