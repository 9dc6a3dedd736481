"""Power laws: known ones are found, intervals cover, and what cannot be told is refused."""

import numpy as np
import pytest

from gptoss_dist.tracking.comparing.fits import final_points, fit_law
from gptoss_dist.tracking.comparing.reading import read_folder
from tests.support.recorded_runs import write_run


def truth(compute, floor=1.7, factor=0.5, exponent=0.2):
    return floor + factor * np.asarray(compute, float) ** -exponent


def test_a_law_without_noise_is_found_exactly():
    compute = np.geomspace(0.01, 1.0, 7)
    fit = fit_law(list("abcdefg"), compute, truth(compute))
    assert fit.floor.value == pytest.approx(1.7, abs=1e-3)
    assert fit.exponent.value == pytest.approx(0.2, abs=1e-3)
    assert fit.factor == pytest.approx(0.5, abs=1e-3)
    assert fit.predict(100.0).value == pytest.approx(truth(100.0), abs=1e-3)


@pytest.mark.parametrize(("points", "std", "span"), [(6, 0.01, 50), (12, 0.01, 1000)])
def test_intervals_cover_the_truth(points, std, span):
    """At ten times the largest budget, for the exponent and for the floor; with 95 % each, 100 times."""
    random = np.random.default_rng(points)
    compute = np.geomspace(0.01, 0.01 * span, points)
    budget = 0.1 * span
    inside, another = [], []
    for _ in range(100):
        fit = fit_law([""] * points, compute, truth(compute) + random.normal(0, std, points))
        predicted, of_a_run = fit.predict(budget), fit.predict_run(budget)
        assert of_a_run.low < predicted.low < predicted.high < of_a_run.high
        another.append(of_a_run.low <= truth(budget) + random.normal(0, std) <= of_a_run.high)
        assert predicted.low <= predicted.value <= predicted.high
        inside.append(
            (
                predicted.low <= truth(budget) <= predicted.high,
                fit.exponent.low <= 0.2 <= fit.exponent.high,
                fit.floor.low <= 1.7 <= fit.floor.high,
            )
        )
    shares = np.mean(inside, axis=0)
    assert (shares > 0.86).all(), shares
    assert np.mean(another) > 0.86
    assert shares[0] < 1.0 or points == 6, "intervals that are never wrong say nothing"


def test_the_interval_grows_with_the_distance():
    compute = np.geomspace(0.01, 1.0, 7)
    losses = truth(compute) + np.random.default_rng(0).normal(0, 0.005, 7)
    fit = fit_law(list("abcdefg"), compute, losses)
    widths = [fit.predict(budget).high - fit.predict(budget).low for budget in (1.0, 10.0, 1000.0)]
    assert widths == sorted(widths) and widths[-1] > 3 * widths[0]
    assert all(fit.predict(budget).low >= fit.floor.low for budget in (10.0, 1e6))


@pytest.mark.parametrize(
    ("compute", "losses", "words"),
    [
        ([0.1, 0.2, 0.4, 0.8], [2.0, 1.9, 1.8, 1.7], "there are 4 that took 4"),
        ([0.1] * 6, [2.0, 1.9, 1.8, 1.7, 2.0, 1.9], "there are 6 that took 1"),
        ([0.1, 0.12, 0.14, 0.16, 0.18], [2.0, 1.9, 1.8, 1.7, 1.6], "1.8 times the smallest"),
        ([0.1, 0.2, 0.4, 0.8, 1.6], [1.0, 1.1, 1.2, 1.3, 1.4], "do not fall"),
        ([], [], "there are 0"),
    ],
)
def test_what_tells_no_law_is_refused(compute, losses, words):
    with pytest.raises(ValueError, match=f"no power law is fitted.*{words}"):
        fit_law([""] * len(compute), np.array(compute), np.array(losses))


def test_the_envelope_leaves_out_runs_that_a_cheaper_one_beats(tmp_path):
    for name, steps, shift in (
        ("short", 101, 0.01),
        ("middle", 160, 0.02),
        ("further", 260, 0.03),
        ("long", 400, 0.04),
        ("bad", 200, 0.5),
        ("worse", 350, 0.6),
        ("first", 80, 0.0),
    ):
        write_run(tmp_path / name, steps=steps, shift=shift, std=0.005, seed=steps)
    order = ("long", "bad", "further", "short", "worse", "first", "middle")
    runs = [read_folder(tmp_path / name) for name in order]
    names, compute, losses = final_points(runs, only_best=True)
    assert names == ["first", "short", "middle", "further", "long"]
    assert list(compute) == sorted(compute) and list(losses) == sorted(losses, reverse=True)
    assert len(final_points(runs, only_best=False)[0]) == 7
    rivals = "; 2 more had cheaper rivals: --fit final takes these too"
    with pytest.raises(ValueError, match=f"there are 4 that took 4{rivals}"):
        final_points(runs[1:], only_best=True)
    write_run(tmp_path / "dearer", steps=480, shift=0.6)
    write_run(tmp_path / "later", steps=330, shift=0.035, std=0.005)
    narrow = [run for run in runs if run.name not in ("first", "bad")]
    narrow += [read_folder(tmp_path / name) for name in ("dearer", "later")]
    with pytest.raises(ValueError, match=f"3.96 times the smallest.*{rivals}"):
        final_points(narrow, only_best=True)
