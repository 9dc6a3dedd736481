"""Lines that are damaged are passed over and counted, whatever the damage; the others count."""

import io
import json
import math
import os

import pandas
import pytest

from gptoss_dist.tracking import jsonl
from gptoss_dist.tracking.jsonl import JsonLinesWriter, read_lines
from gptoss_dist.tracking.plots import plot_run
from gptoss_dist.tracking.records import operation
from gptoss_dist.tracking.tracker import read_metrics, read_resume_steps
from tests.support.tracked import start

GOOD = [{"step": step, "time": 100.0 + step, "metrics": {"loss/train": 4.0 - step}} for step in (1, 2, 3)]
DAMAGED = {
    "no step": b'{"time": 1.0, "metrics": {"loss/train": 1.0}}',
    "no time": b'{"step": 2, "metrics": {"loss/train": 1.0}}',
    "text for a step": b'{"step": "2", "time": 1.0, "metrics": {}}',
    "a fraction of a step": b'{"step": 2.5, "time": 1.0, "metrics": {}}',
    "true for a step": b'{"step": true, "time": 1.0, "metrics": {}}',
    "a step of 400 digits": b'{"step": 1%s, "time": 1.0, "metrics": {}}' % (b"0" * 400),
    "a step before the first": b'{"step": -1, "time": 1.0, "metrics": {}}',
    "a value of 400 digits": b'{"step": 2, "time": 1.0, "metrics": {"loss/train": 1%s}}' % (b"0" * 400),
    "a value of 5000 digits": b'{"step": 2, "time": 1.0, "metrics": {"loss/train": 1%s}}' % (b"0" * 5000),
    "a time of 400 digits": b'{"step": 2, "time": 1%s, "metrics": {}}' % (b"0" * 400),
    "a time that is not finite": b'{"step": 2, "time": NaN, "metrics": {}}',
    "a time in the year 30,000": b'{"step": 2, "time": 1e12, "metrics": {}}',
    "a list for a value": b'{"step": 2, "time": 1.0, "metrics": {"loss/train": [1.0]}}',
    "a text for a value": b'{"step": 2, "time": 1.0, "metrics": {"loss/train": "1.0"}}',
    "a list of metrics": b'{"step": 2, "time": 1.0, "metrics": [1.0]}',
    "a resume without a step": b'{"event": "resume", "time": 1.0}',
    "a resume to a text": b'{"event": "resume", "step": "1"}',
    "deep nesting": b'{"step": 2, "time": 1.0, "metrics": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
    "a list": b"[1, 2]",
    "a number": b"7",
    "nothing": b"",
    "no JSON": b"{'step': 2}",
    "half a line": b'{"step": 2, "time": 1.0, "met',
    "two lines in one": b'{"step": 2, "time": 1.0{"step": 3}',
    "zeros": b"\0" * 4096,
    "not UTF-8": b'{"step": 2, "time": 1.0, "metrics": {"\xff\xfe": 1.0}}',
    "bytes": bytes(range(1, 10)) + bytes(range(11, 256)),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_passed_over_and_counted(tmp_path, damage):
    lines = [json.dumps(row).encode() for row in GOOD]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([lines[0], damage, lines[1], damage, lines[2]]) + b"\n")
    said = []
    assert read_metrics(tmp_path, said.append) == GOOD
    assert said == [f"{tmp_path / 'metrics.jsonl'}: 2 damaged lines were passed over; the other lines count"]
    assert read_resume_steps(tmp_path) == []


def test_plots_are_drawn_of_what_is_left(tmp_path):
    lines = [*(json.dumps(row).encode() for row in GOOD), *DAMAGED.values()]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    expert_lines = [
        '{"first_step": 1, "step": 2, "tokens": [[1, 2], [3, 4]]}',
        '{"first_step": 1, "step": 3, "tokens": [[1], [2, 3]]}',
        '{"first_step": 1, "step": 3, "tokens": [["a"]]}',
        '{"tokens": []}',
        '{"event": "resume"}',
    ]
    (tmp_path / "expert_tokens.jsonl").write_text("\n".join(expert_lines) + "\n")
    said = []
    assert {path.name for path in plot_run(tmp_path, said.append)} >= {"overview.png", "loss.png", "expert_tokens.png"}
    assert [text.split(": ")[1].split(" ")[0] for text in said] == [str(len(DAMAGED)), "4"]


def test_a_line_too_long_to_read_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 100)
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 250 + b'"}\n{"c": 3}\n{"d": "' + b"y" * 250)
    assert [record for record, _ in read_lines(path)] == [{"a": 1}, {}, {"c": 3}]


def test_a_line_that_is_seen_in_pieces_is_one_line(tmp_path, monkeypatch):
    """Its writer was in the middle of it when the reader came; of a line that has no end yet nothing is read."""
    pieces, whole = ['{"a"', ": 1", "}\n", '{"b": 2}\n', '{"c"'], tmp_path / "whole.jsonl"
    whole.write_text("")

    class Growing(io.BytesIO):
        def readline(self, size=-1):
            return pieces.pop(0).encode() if pieces else b""

    monkeypatch.setattr("builtins.open", lambda *arguments: Growing())
    assert list(read_lines(whole)) == [({"a": 1}, 9), ({"b": 2}, 18)]


JOURNAL = {
    "op": "run",
    "time": 1.0,
    "uid": "abc",
    "run_name": "r",
    "experiment": "e",
    "params": {"a": "1"},
    "tags": {},
    "dataset": {"name": "n", "digest": "d", "source": "s"},
    "resume": 0,
    "resumed_step": None,
}


@pytest.mark.parametrize(
    "key, value",
    [
        ("op", "rum"),
        ("op", ["run"]),
        ("time", None),
        ("time", "now"),
        ("uid", 5),
        ("uid", "x' OR '1"),
        ("run_name", None),
        ("experiment", {}),
        ("params", []),
        ("params", {"a": 1}),
        ("tags", {"a": None}),
        ("dataset", "d"),
        ("resume", "1"),
        ("resume", 10**400),
        ("resumed_step", -1),
    ],
)
def test_a_damaged_operation_is_none(key, value):
    assert operation(JOURNAL) is not None
    assert operation(JOURNAL | {key: value}) is None


def test_values_that_are_not_finite_are_numbers_to_other_readers(tmp_path):
    tracker = start(tmp_path, enabled=False)
    values = [1.0, math.nan, math.inf, -math.inf]
    for step, value in enumerate(values, 1):
        tracker.log(step, {"loss/train": value, "loss/val": 1.0})
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for frame in (
        pandas.json_normalize(lines),
        pandas.json_normalize(pandas.read_json(tmp_path / "metrics.jsonl", lines=True)["metrics"]).add_prefix(
            "metrics."
        ),
    ):
        assert frame["metrics.loss/train"].dtype == "float64" and frame["metrics.loss/train"].isna().sum() == 3
    assert [str(row["metrics"]["loss/train"]) for row in read_metrics(tmp_path)] == ["1.0", "nan", "inf", "-inf"]
    # What earlier versions wrote.
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "metrics": {"a": "NaN", "b": "-Infinity"}}\n')
    assert [str(value) for value in read_metrics(tmp_path)[0]["metrics"].values()] == ["nan", "-inf"]


@pytest.mark.parametrize(
    "place",
    [
        "metrics.jsonl",
        "tracking",
        "tracking/journal.jsonl",
        "tracking/cursor.json",
        "tracking/lock",
        "expert_tokens.jsonl",
    ],
)
@pytest.mark.parametrize("kind", ["folder", "pipe", "full disk", "dangling link", "deep JSON"])
def test_what_stands_in_a_files_place_costs_lines_and_not_the_run(tmp_path, place, kind):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    match kind:
        case "folder":
            (path / "full").mkdir(parents=True)
        case "pipe":
            os.mkfifo(path)
        case "full disk":
            path.symlink_to("/dev/full")
        case "dangling link":
            path.symlink_to(tmp_path / "nowhere" / "file")
        case "deep JSON":
            path.write_bytes(b"[" * 100_000)
    said = []
    tracker = start(tmp_path, enabled=False, resumed_step=3, message=said.append)
    tracker.log(4, {"loss/train": 1.0})
    tracker.tag("a", "b")
    tracker.close()
    if place == "metrics.jsonl" and kind != "deep JSON":
        assert len(said) == 1 and str(path) in said[0]
    else:
        assert [row["step"] for row in read_metrics(tmp_path, said.append)] == [4]
    assert len(said) <= 2


def test_a_writer_on_a_named_pipe_does_not_wait_for_a_reader(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    said = []
    writer = JsonLinesWriter(tmp_path / "pipe", said.append)
    writer.append({"a": 1})
    writer.close()
    assert len(said) == 1
