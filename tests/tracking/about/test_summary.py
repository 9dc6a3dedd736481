"""How a run stands: costs and losses over several processes."""

import dataclasses
import json
import time

import pytest

from gptoss_dist.tracking.about.summary import Summary, last_values
from gptoss_dist.tracking.records import Event
from gptoss_dist.tracking.tracker import Tracker
from tests.tracking.about.test_note import FACTS, rows


def test_costs_add_up_over_processes_and_lost_steps(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("gptoss_dist.tracking.about.summary.time.monotonic", lambda: clock[0])
    facts = dataclasses.replace(FACTS, folder=tmp_path, processes=4, flops_per_token=1e12)
    losses = {10: 5.0, 20: 3.0, 30: 2.0}
    tracker, summary = Tracker(tmp_path, run_name="x", enabled=False), Summary(facts, 0, 0)
    tracker.event(0, "start", "begins")
    for step in range(1, 31):
        clock[0] += 36.0
        metrics = {"loss/train": float(step), "progress/tokens": 1000.0 * step}
        costs = summary.step(step, metrics)
        tracker.log(step, metrics | costs)
        if step in losses:
            tracker.log(step, {"loss/val": losses[step]} | summary.validation(step, losses[step]))
    tracker.event(25, "skipped", "loss nan")
    tracker.close("KILLED")
    assert costs == pytest.approx(
        {"progress/exaflops": 0.03, "progress/hours": 0.3, "progress/gpu_hours": 1.2}, rel=1e-12
    )

    # Twice as many processes go on from step 20: what was done after it is lost, and was paid for.
    clock[0] += 1e6
    facts = dataclasses.replace(facts, processes=8)
    resumed = Summary(facts, 20, 20_000)
    resumed.read_back()
    assert resumed.best == (3.0, 20), "the loss of step 30 is one of an abandoned branch"
    assert [event.kind for event in resumed.events] == ["start", "skipped"] and resumed.counts["skipped"] == 1
    assert resumed.event(Event(time.time(), 26, "skipped", "again")) == 2
    clock[0] += 360.0
    costs = resumed.step(21, {"loss/train": 2.5, "progress/tokens": 21_000.0})
    assert costs == pytest.approx({"progress/exaflops": 0.021, "progress/hours": 0.4, "progress/gpu_hours": 2.0})
    assert resumed.validation(30, 4.0) == pytest.approx(
        {"loss/val_best": 3.0, "progress/val_tokens": 21_000, "progress/val_exaflops": 0.021}
    )
    note = resumed.note("running")
    assert "validation loss best **3.0000** at step 20, last 4.0000 at step 30" in note
    assert "0.021 exaFLOPs, 2.00 device-hours" in note and rows(note)["hours"] == "0.40, of 2.00 device-hours"


def test_what_cannot_be_read_costs_nothing_but_itself(tmp_path):
    summary = Summary(dataclasses.replace(FACTS, folder=tmp_path), 5, 100)
    summary.read_back()  # no files at all
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "metrics": {"progress/hours": 1e400}}\nnonsense\n')
    summary.read_back()
    note = summary.note("running")
    assert "validation loss: none yet" in note and "0.00 device-hours" in note


def test_losses_that_are_no_numbers_do_not_spoil_the_mean(tmp_path):
    summary = Summary(dataclasses.replace(FACTS, folder=tmp_path), 0, 0)
    for step, loss in enumerate((4.0, float("nan"), 2.0, float("inf")), 1):
        summary.step(step, {"loss/train": loss, "progress/tokens": 1.0})
    assert "training 3.0000 (mean of 2 steps)" in summary.note("running")


def test_the_last_values_are_those_of_the_file_not_of_the_branch(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": n, "time": 1.0, "metrics": {"progress/hours": n / 7, "y" * 500: 1.0}} for n in range(2000)]
    torn = '{"step": 2000, "time": 1.0, "metrics": {"progress/hours": 6'  # of 62.5
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"event": "resume", "step": 3}]) + torn)
    assert last_values(path, ("progress/hours", "progress/gpu_hours")) == {"progress/hours": 1999 / 7}
    path.write_text(json.dumps(lines[14]) + "\n")
    assert last_values(path, ("progress/hours",)) == {"progress/hours": 2.0}, "a file that is shorter than the tail"


@pytest.mark.parametrize("damaged", ["last_values", "read_columns", "operation"])
def test_one_damaged_source_costs_nothing_of_the_others(tmp_path, monkeypatch, damaged):
    tracker = Tracker(tmp_path, run_name="x", enabled=False)
    tracker.log(1, {"progress/hours": 1.5, "progress/gpu_hours": 3.0, "loss/val": 2.0})
    tracker.event(1, "data", "changed")
    tracker.close()

    def fail(*arguments):
        raise OSError("damaged")

    monkeypatch.setattr(f"gptoss_dist.tracking.about.summary.{damaged}", fail)
    summary = Summary(dataclasses.replace(FACTS, folder=tmp_path), 5, 100)
    summary.read_back()
    note = summary.note("running")
    found = ["3.00 device-hours" in note, "best **2.0000**" in note, "data changed at step 1" in note]
    assert found == [name != damaged for name in ("last_values", "read_columns", "operation")]


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    facts = dataclasses.replace(FACTS, folder=tmp_path)
    summary = Summary(facts, 0, 0)
    assert "loss/val_best" not in summary.validation(1, float("nan")) and summary.best is None
    assert summary.validation(2, 4.0)["loss/val_best"] == 4.0
    assert summary.validation(3, float("nan"))["loss/val_best"] == 4.0 and summary.best == (4.0, 2)
    tracker = Tracker(tmp_path, run_name="x", enabled=False)
    for step, loss in enumerate((float("nan"), 4.0, float("-inf")), 1):
        tracker.log(step, {"loss/val": loss})
    tracker.close()
    resumed = Summary(facts, 3, 0)
    resumed.read_back()
    assert resumed.best == (4.0, 2)


def test_many_checkpoints_push_nothing_out_of_the_note(tmp_path):
    summary = Summary(dataclasses.replace(FACTS, folder=tmp_path), 900, 1, skipped_steps=60)
    assert "60 skipped\n" in summary.note("running"), "known before the first step"
    summary.event(Event(1.7e9, 2, "resume", "again"))
    for step in range(1, 901):
        summary.event(Event(1.7e9, step, "checkpoint", f"`step {step}`"))
        if step % 15 == 0:
            summary.event(Event(1.7e9, step, "skipped", "loss nan"))
    note = summary.note("running")
    assert "resumed after step 2; 60 skipped: step 840, 855, 870, 885, 900 and 55 more" in note
    assert rows(note)["checkpoint"] == "`step 900`" and "(the last 20 of 61)" in note
