"""Metrics as arrays against `read_metrics`, which reads them line by line."""

import json
import math
import random

import numpy as np
import pytest

from gptoss_dist.tracking.recorded import columns as columns_module
from gptoss_dist.tracking.recorded.columns import COLUMNS_FOLDER, read_columns
from gptoss_dist.tracking.records import METRICS_FILE, Damage, Resumed, metrics_line, metrics_records
from gptoss_dist.tracking.tracker import read_metrics, read_resume_steps

LINES = 7


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr(columns_module, "LINES", LINES)


def lines_of_a_run(seed, steps=60):
    """A run that is validated, goes back now and then, and has damaged lines."""
    rng = random.Random(seed)
    step, time, lines = 0, 1000.0, []
    while step < steps:
        step, time = step + 1, time + rng.random()
        metrics = {"loss/train": rng.random(), "loss/aux": rng.choice([1.0, math.inf, math.nan])}
        lines.append(json.dumps(metrics_line(step, time, metrics)))
        if step % 5 == 0:
            lines.append(json.dumps(metrics_line(step, time + 0.1, {"loss/val": rng.random()})))
        if rng.random() < 0.1:
            lines.append(rng.choice(["{", '{"step": -1}', "[]"]))
        if rng.random() < 0.08:
            step = rng.randrange(step + 1)
            lines.append(json.dumps({"event": "resume", "step": step, "time": time}))
    return lines


def write(folder, lines, *, mode="w"):
    with open(folder / METRICS_FILE, mode) as file:
        file.writelines(f"{line}\n" for line in lines)


def first_times(folder):
    """When each step was first written, of the branch that was taken."""
    times = {}
    for record in metrics_records(folder / METRICS_FILE, Damage(folder)):
        if isinstance(record, Resumed):
            times = {step: time for step, time in times.items() if step <= record.step}
        else:
            times.setdefault(record.step, record.time)
    return dict(sorted(times.items()))


def assert_same(columns, folder):
    rows = read_metrics(folder, lambda text: None)
    assert columns.steps.tolist() == [row["step"] for row in rows]
    assert columns.times.tolist() == list(first_times(folder).values())
    assert columns.resumes == read_resume_steps(folder)
    assert set(columns) == {name for row in rows for name in row["metrics"]} | set(columns)
    for name in columns:
        expected = [row["metrics"].get(name, math.nan) for row in rows]
        np.testing.assert_array_equal(columns[name], expected)
        at, values = columns.points(name)
        assert values.tolist() == [value for value in expected if not math.isnan(value)]
        assert not np.isnan(columns[name][at]).any()


@pytest.mark.parametrize("seed", range(8))
def test_columns_are_the_lines_however_much_of_them_is_kept(tmp_path, seed):
    lines, told = lines_of_a_run(seed), []
    for count in (1, LINES - 1, LINES, LINES + 1, len(lines) // 2, len(lines)):
        write(tmp_path, lines[:count])
        assert_same(read_columns(tmp_path, told.append), tmp_path)
        assert len(list((tmp_path / COLUMNS_FOLDER).glob("*.columns"))) == count // LINES
    assert_same(read_columns(tmp_path, told.append), tmp_path)
    damaged = sum(line in ("{", '{"step": -1}', "[]") for line in lines)
    assert (f"{damaged} damaged" in told[-1] or "1 damaged line was" in told[-1]) if damaged else not told


def test_what_was_kept_is_not_parsed_again(tmp_path, monkeypatch):
    write(tmp_path, lines_of_a_run(3))
    before = read_columns(tmp_path)
    read = []
    real = columns_module.metrics_record
    monkeypatch.setattr(columns_module, "metrics_record", lambda line: read.append(line) or real(line))
    again = read_columns(tmp_path)
    assert len(read) < LINES
    np.testing.assert_array_equal(again["loss/train"], before["loss/train"])


def test_the_rest_is_kept_until_a_line_is_added(tmp_path, monkeypatch):
    monkeypatch.setattr(columns_module, "_LEAST_REST", 2)
    lines = lines_of_a_run(3)
    count = len(lines) // LINES * LINES - 2
    write(tmp_path, lines[:count])
    read_columns(tmp_path, lambda text: None)
    read = []
    real = columns_module.metrics_record
    monkeypatch.setattr(columns_module, "metrics_record", lambda line: read.append(line) or real(line))
    assert_same(read_columns(tmp_path, lambda text: None), tmp_path)
    assert not read
    earlier, expected = read_columns(tmp_path, lambda text: None), read_metrics(tmp_path, lambda text: None)
    for end in range(count + 1, len(lines) + 1):  # over the end of a segment
        write(tmp_path, lines[end - 1 : end], mode="a")
        assert_same(read_columns(tmp_path, lambda text: None), tmp_path)
    # Who read the file before it was replaced asks for a column only now.
    assert earlier["loss/train"].tolist() == [row["metrics"].get("loss/train", math.nan) for row in expected]
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"step": 1')  # a line that is being written
    assert_same(read_columns(tmp_path, lambda text: None), tmp_path)


@pytest.mark.parametrize("damage", ["cut", "other_lines", "garbage", "other_format"])
def test_what_was_kept_of_other_lines_is_not_believed(tmp_path, damage):
    write(tmp_path, lines_of_a_run(1))
    read_columns(tmp_path)
    kept = tmp_path / COLUMNS_FOLDER / "1.columns"
    match damage:
        case "cut":
            kept.write_bytes(kept.read_bytes()[:-8])
        case "other_lines":
            write(tmp_path, lines_of_a_run(2))
        case "garbage":
            kept.write_bytes(b"\x00" * 500)
        case "other_format":
            kept.write_bytes(kept.read_bytes().replace(b'"format": 1', b'"format": 9', 1))
    assert_same(read_columns(tmp_path, lambda text: None), tmp_path)
    assert_same(read_columns(tmp_path, lambda text: None), tmp_path)


def test_a_folder_that_is_not_ours_is_read_and_left_alone(tmp_path):
    write(tmp_path, lines_of_a_run(4))
    assert_same(read_columns(tmp_path, lambda text: None, keep=False), tmp_path)
    assert not (tmp_path / "tracking").exists()
    (tmp_path / "tracking").write_text("a file in the way")
    assert_same(read_columns(tmp_path, lambda text: None), tmp_path)


def test_a_column_that_is_cut_when_it_is_asked_for_has_no_numbers(tmp_path):
    lines = lines_of_a_run(7)  # which never goes back
    write(tmp_path, lines)
    read_columns(tmp_path, lambda text: None)
    columns, kept = read_columns(tmp_path, lambda text: None), tmp_path / COLUMNS_FOLDER / "0.columns"
    whole, step = read_columns(tmp_path, lambda text: None)["loss/train"], json.loads(lines[LINES - 1])["step"]
    kept.write_bytes(kept.read_bytes()[: -12 * LINES])  # in the middle of this column, before that of loss/val
    found = columns["loss/train"]
    assert np.isnan(found[:step]).all() and not np.isnan(whole[:step]).any()
    np.testing.assert_array_equal(found[step:], whole[step:])


def test_no_metrics_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl does not exist; give the folder of a run"):
        read_columns(tmp_path)
