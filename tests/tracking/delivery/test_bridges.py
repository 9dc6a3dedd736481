"""Metrics in TensorBoard's event files, read back by TensorBoard's own reader."""

import json
import math
import struct
import threading
import time

import pytest

from gptoss_dist.tracking.delivery import bridges
from gptoss_dist.tracking.delivery.bridges import PLACES_FILE, Bridges, check_bridges
from gptoss_dist.tracking.tracker import read_metrics
from tests.support.ranks import run
from tests.support.tracked import start

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def scalars(run_dir, folder="tensorboard") -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each metric, as TensorBoard shows them."""
    events = accumulator.EventAccumulator(str(run_dir / folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def record(run_dir, steps, value, names=("tensorboard",), **options):
    """Log a value for each step, with a bridge beside; return what was said."""
    said = []
    tracker = start(run_dir, enabled=False, message=said.append, **options)
    follower = Bridges(run_dir, names, said.append, interval_s=0.02)
    for step in steps:
        tracker.log(step, {"loss/train": value + step, "optim/lr": 0.5})
    tracker.close()
    follower.close(timeout=120)
    return said


def test_rows_arrive_and_a_resume_takes_the_place_of_what_it_gave_up(tmp_path):
    folder = tmp_path / "run"
    assert record(folder, range(1, 7), 0.0) == []
    assert scalars(folder)["loss/train"] == [(step, float(step)) for step in range(1, 7)]
    assert record(folder, range(4, 9), 100.0, resumed_step=3) == []
    expected = [(step, step + (100.0 if step > 3 else 0.0)) for step in range(1, 9)]
    assert scalars(folder)["loss/train"] == expected and len(scalars(folder)["optim/lr"]) == 8
    assert expected == [(row["step"], row["metrics"]["loss/train"]) for row in read_metrics(folder)]
    assert json.loads((folder / PLACES_FILE).read_text()) == {"tensorboard": (folder / "metrics.jsonl").stat().st_size}


def test_none_is_lost_by_a_kill_and_another_run_in_the_folder_begins_anew(tmp_path):
    folder = tmp_path / "run"
    record(folder, range(1, 4), 0.0)
    # Killed after the rows were written and before that was noted; or what was noted is damaged.
    for text in ('{"tensorboard": 0}', "{", '{"tensorboard": 5}', '{"tensorboard": 10000000}'):
        (folder / PLACES_FILE).write_text(text)
        record(folder, [], 0.0, resumed_step=3)
        found = [
            entry
            for name in ("tensorboard", "tensorboard.1")
            if (folder / name).exists()
            for entry in scalars(folder, name)["loss/train"]
        ]
        assert set(found) == {(1, 1.0), (2, 2.0), (3, 3.0)}
    record(folder, range(1, 3), 50.0)  # a fresh start
    assert scalars(folder)["loss/train"] == [(1, 51.0), (2, 52.0)]


def test_files_of_a_run_that_was_killed_before_its_first_rows_stay_its_own(tmp_path):
    folder = tmp_path / "run"
    assert record(folder, [], 0.0) == [] and record(folder, [1], 0.0, resumed_step=0) == []
    assert not (folder / "tensorboard.1").exists() and scalars(folder)["loss/train"] == [(1, 1.0)]


def test_a_run_that_goes_back_does_not_wait_and_its_rows_keep_their_order(tmp_path, monkeypatch):
    entered, going_on, order = threading.Event(), threading.Event(), []

    class Slow(bridges.TensorBoard):
        def row(self, row):
            entered.set()
            assert going_on.wait(60)
            order.append(row.step)

    monkeypatch.setitem(bridges.BRIDGES, "tensorboard", Slow)
    folder, followers = tmp_path / "run", []
    for step in (3, 2, 1):
        tracker = start(folder, enabled=False, resumed_step=step - 1)
        tracker.log(step, {"a": 1.0})
        followers.append(Bridges(folder, ["tensorboard"], pytest.fail, interval_s=0.01))
        assert entered.wait(60)
        followers[-1].stop()
        tracker.close()
    going_on.set()
    followers[-1].close(timeout=60)
    assert order == [3, 2, 1] and not (folder / "tensorboard.1").exists()


def test_values_that_are_not_finite_and_damaged_lines(tmp_path):
    folder = tmp_path / "run"
    tracker = start(folder, enabled=False)
    tracker.log(1, {"a": math.inf, "b": math.nan})
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": "x"}\n[1]\n{"step": 2, "ti')
    tracker.close()
    Bridges(folder, ["tensorboard"], pytest.fail).close()
    found = scalars(folder)
    assert found["a"] == [(1, math.inf)] and math.isnan(found["b"][0][1])


def test_a_failure_costs_one_message(tmp_path, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def fail(self, data):
        raise OSError(28, "No space left on device")

    tracebacks = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    monkeypatch.setattr(RecordWriter, "write", fail)
    said = record(tmp_path / "run", range(1, 50), 0.0)
    assert not tracebacks
    assert len(said) == 1 and said[0].startswith("tracking.also=tensorboard: OSError: [Errno 28]")
    assert len(read_metrics(tmp_path / "run")) == 49


def test_one_that_takes_too_long_is_not_waited_for(tmp_path, monkeypatch):
    class Slow(bridges.TensorBoard):
        def row(self, row):
            time.sleep(0.5)

    monkeypatch.setitem(bridges.BRIDGES, "tensorboard", Slow)
    said, tracker = [], start(tmp_path / "run", enabled=False)
    tracker.log(1, {"a": 1.0})
    tracker.close()
    follower = Bridges(tmp_path / "run", ["tensorboard"], said.append, interval_s=0.01)
    follower.close(timeout=0.1)
    assert said == ["tracking.also=tensorboard: not everything was taken in 0.1 s; metrics.jsonl has all"]
    follower.close()


def test_a_missing_package_is_refused_with_the_remedy(monkeypatch):
    check_bridges(["tensorboard"])
    monkeypatch.setattr(bridges, "find_spec", lambda name: None)
    check_bridges([])
    with pytest.raises(ValueError, match=r"tracking\.also=tensorboard needs .* --extras tensorboard`") as error:
        check_bridges(["tensorboard"])
    assert "\n" not in str(error.value)


def history_of_wandb(run_dir) -> list[dict[str, float]]:
    """Rows that W&B keeps of a run offline: LevelDB's log format behind a header of 7 bytes, each record a protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        data, at, record = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:  # the rest of a block
                at += 32768 - at % 32768
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            record += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part
                items = Record.FromString(record).history.item
                rows += [{(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}] if items else []
                record = b""
    return rows


@pytest.mark.heavy
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run"
    assert record(folder, range(1, 4), 0.0, names=["wandb"]) == []
    (first,) = folder.glob("wandb/offline-run-*")
    assert record(folder, range(3, 6), 10.0, names=["wandb"], resumed_step=2) == []
    second = next(path for path in folder.glob("wandb/offline-run-*") if path != first)
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2]  # one run, by its id
    until, found = time.monotonic() + 30, []
    while len(found) < 6 and time.monotonic() < until:  # W&B's own process closes the file when it comes to it
        found = [(row["step"], row["loss/train"]) for row in history_of_wandb(folder)]
        time.sleep(0.05)
    assert sorted(found) == [(1, 1.0), (2, 2.0), (3, 3.0), (3, 13.0), (4, 14.0), (5, 15.0)]


def test_weights_and_biases_without_a_login_asks_nobody(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    (said,) = record(tmp_path / "run", [1], 0.0, names=["wandb"])
    assert "`wandb login` first, set WANDB_API_KEY, or WANDB_MODE=offline" in said and "\n" not in said


@pytest.mark.distributed
def test_a_resumed_run(settings, tmp_path):
    options = ["--config", str(settings), "--run.dir", str(tmp_path / "run"), "--tracking.also", "[tensorboard]"]
    options += ["--tracking.mlflow", "false", "--optim.warmup_steps", "1"]
    run("launch/train.py", *options, "--train.steps", "4", cwd=tmp_path)
    run("launch/train.py", *options, "--train.steps", "6", "--resume", "auto", cwd=tmp_path)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss/train" in row["metrics"]]
    found = scalars(tmp_path / "run")
    assert [step for step, _ in found["loss/train"]] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in found["loss/train"]] == pytest.approx([row["metrics"]["loss/train"] for row in rows])
    assert {key for row in rows for key in row["metrics"]} <= found.keys()
