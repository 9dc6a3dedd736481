"""The planner's throughput of published runs is near what was published, with one set of efficiency factors."""

from pathlib import Path

import pytest

from gptoss_dist.planner.timing.accuracy import Prediction, predict_published, table
from gptoss_dist.planner.timing.published import PUBLISHED
from gptoss_dist.planner.timing.roofline import StepTime
from gptoss_dist.train.objectives import next_token_prediction

BY_NAME = {run.name: run for run in PUBLISHED}
FAST = "gpt-oss-20b, 8 H100"


def near(name: str) -> None:
    prediction = predict_published(BY_NAME[name], next_token_prediction)
    assert prediction.ratio == pytest.approx(1, abs=0.3)
    assert 0 < prediction.step.exposed_s < prediction.step.seconds


@pytest.mark.heavy
def test_a_published_run_is_predicted_within_30_percent():
    near(FAST)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BY_NAME if name != FAST])
def test_every_published_run_is_predicted_within_30_percent(name):
    near(name)


def test_the_page_prints_every_run_once():
    page = (Path(__file__).parents[3] / "docs/planning_time.md").read_text()
    rows = [line for line in page.split("## Published runs\n")[1].splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(row[0], row[2]) for row in cells] == [(r.name, f"{r.tokens_per_s_per_gpu:,.0f}") for r in PUBLISHED]
    for _, predicted, published, ratio in cells:
        assert float(ratio) == pytest.approx(_number(predicted) / _number(published), abs=0.006)


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def test_the_ratio_is_of_throughputs():
    run = BY_NAME[FAST]
    exact = Prediction(run, StepTime(seconds=run.step_s))
    assert exact.ratio == pytest.approx(1) and Prediction(run, StepTime(seconds=run.step_s / 2)).ratio == pytest.approx(
        2
    )
    assert table([exact]).splitlines()[-1] == f"| {FAST} | 13,058 | 13,058 | 1.00 |"
