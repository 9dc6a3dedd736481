"""Losses at equal tokens, FLOPs and hours, against a recomputation from the lines of metrics.jsonl."""

import itertools
import json
import math

import numpy as np
import pytest

from gptoss_dist.tracking.comparing.equal import equal_table, place_of
from gptoss_dist.tracking.comparing.reading import read_folder
from tests.support.recorded_runs import TOKENS_PER_STEP, law, write_run


def recomputed(folder, axis, place, half):
    """The smoothed training loss and the validation loss at a place, by loops over the lines of the file."""
    rows = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "event" in line:
            rows = {step: row for step, row in rows.items() if step <= line["step"]}
        else:
            rows.setdefault(line["step"], {"time": line["time"]}).update(line["metrics"])
    points, validations = [], []
    for step in sorted(rows):
        row = rows[step]
        x = (row["time"] - 1000.0) / 3600 if axis == "hours" else row[f"progress/{axis}"]
        if row.get("loss/train") is not None:
            points.append((x, row["loss/train"]))
        if "loss/val" in row:
            validations.append((x, row["loss/val"]))
    near = [(x - place, y) for x, y in points if place - half <= x <= place + half]
    count = len(near)
    sx, sy = sum(x for x, _ in near), sum(y for _, y in near)
    sxx, sxy = sum(x * x for x, _ in near), sum(x * y for x, y in near)
    slope = (count * sxy - sx * sy) / (count * sxx - sx * sx)
    smooth = (sy - slope * sx) / count
    between = math.nan
    for (x0, y0), (x1, y1) in itertools.pairwise(validations):
        if x0 <= place <= x1:
            between = y0 + (y1 - y0) * (place - x0) / (x1 - x0)
    return smooth, between


def resume(folder, back, steps):
    """Let a run of 9 s a step go back to step `back`, and on to `steps`, without a pause."""
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = json.loads(lines[-1])
    again = [{"event": "resume", "step": back, "time": last["time"]}]
    for line in map(json.loads, lines):
        if back < line["step"] <= steps:
            line["time"] += 1
            line["metrics"] = {key: value + 0.01 * key.startswith("loss") for key, value in line["metrics"].items()}
            again.append(line)
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in again)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "a", steps=400, seed=1)
    write_run(root / "b", steps=350, seed=2, flops_per_token=3e9, seconds_per_step=5.0)
    write_run(root / "c", steps=390, seed=3, tokens_per_step=8192, validate_every=70)
    resume(root / "c", 200, 380)
    return [root / name for name in "abc"]


@pytest.mark.parametrize("axis", ["tokens", "exaflops", "hours"])
@pytest.mark.parametrize("asked", [[], [0.4, 0.03, 0.75]])
def test_tables_agree_with_a_recomputation(folders, axis, asked):
    runs = [read_folder(folder) for folder in folders]
    ends = [run.at_most(axis) for run in runs]
    table = equal_table(runs, axis, [share * max(ends) for share in asked])
    if not asked:
        assert table.places == [0.25 * min(ends), 0.5 * min(ends), min(ends)]
    compared = 0
    for folder, end, train, validation in zip(folders, ends, table.train, table.validation["loss/val"]):
        if axis == "hours" and folder.name == "c":
            continue  # whose hours, with those of the steps it lost, are the subject of tests/tracking/recorded
        for place, half, one, between in zip(table.places, table.half_widths, train, validation):
            if place > end:
                assert not one.is_known and math.isnan(between)
                continue
            smooth, expected = recomputed(folder, axis, place, half)
            assert one.value == pytest.approx(smooth, rel=1e-9)
            np.testing.assert_allclose(between, expected, rtol=1e-9, equal_nan=True)
            compared += 1
    assert compared >= 4


def test_rows_that_a_resume_abandoned_do_not_count(folders):
    run = read_folder(folders[2])
    assert run.steps[-1] == 380 and len(run.steps) == 380


def test_a_run_that_got_nowhere_does_not_drag_the_others_along(tmp_path):
    """One crashed early, one has NaN from its 60th step on: the others are compared where they are."""
    diverged = np.where(np.arange(400) < 60, law(TOKENS_PER_STEP * np.arange(1, 401)), np.nan)
    write_run(tmp_path / "crashed", steps=40)
    write_run(tmp_path / "diverged", losses=diverged)
    for name, steps in (("a", 400), ("b", 300), ("c", 380)):
        write_run(tmp_path / name, steps=steps)
    names = ["a", "b", "c", "crashed", "diverged"]
    runs = [read_folder(tmp_path / name) for name in names]
    table = equal_table(runs, "tokens", [])
    assert table.places[-1] == 300 * TOKENS_PER_STEP
    assert [row[-1].is_known for row in table.train] == [True, True, True, False, False]
    left_out, limited = table.notes(names, [run.status for run in runs], is_first=True)
    assert "crashed (finished, its losses end at 163.8k tokens), diverged (finished, its losses" in left_out
    assert "up to where b (finished, its losses end at 1.229M tokens) got" in limited
    assert equal_table(runs[:1] + runs[3:4], "tokens", []).places[-1] == 40 * TOKENS_PER_STEP, "of two, neither is odd"
    assert equal_table(runs, "tokens", [4e5]).notes(names, names, is_first=True) == [], "who asks for a place gets it"


def test_a_small_model_has_a_say_although_its_flops_are_few(tmp_path):
    for name, flops in (("small", 1e8), ("large", 1e9), ("larger", 2e9)):
        write_run(tmp_path / name, flops_per_token=flops, seconds_per_step=flops / 1e8)
    runs = [read_folder(tmp_path / name) for name in ("small", "large", "larger")]
    for axis in ("exaflops", "hours"):
        table = equal_table(runs, axis, [])
        assert table.places[-1] == table.ends[0] and table.left_out == [] and table.limiting == 0


def test_the_best_validation_so_far_is_no_source(folders):
    assert list(equal_table([read_folder(folder) for folder in folders], "tokens", []).validation) == ["loss/val"]


def test_an_axis_that_is_not_known_gives_no_table(folders, tmp_path):
    write_run(tmp_path / "x", more={"progress/exaflops": np.full(400, np.nan)}, flops_per_token=math.nan)
    write_run(tmp_path / "y")
    runs = [read_folder(tmp_path / name) for name in "xy"]
    assert equal_table(runs, "exaflops", []) is None
    assert not equal_table([*runs, runs[1]], "exaflops", []).train[0][0].is_known


@pytest.mark.parametrize(
    ("text", "value"), [("300k", 3e5), ("1.5M", 1.5e6), ("2e9", 2e9), ("300,000", 3e5), ("2B", 2e9), ("0.5", 0.5)]
)
def test_amounts_as_people_write_them(text, value):
    assert place_of(text) == value


@pytest.mark.parametrize("text", ["", "k", "-3", "0", "1.2.3", "3x", "nan", "inf", "1e999"])
def test_other_amounts_are_refused(text):
    with pytest.raises(ValueError, match="is no amount; give a number above 0"):
        place_of(text)
