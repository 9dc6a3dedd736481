"""Nothing that a run records beside its metrics ends it."""

import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gptoss_dist.config import Config, ModelConfig, RunConfig, SamplingConfig, TrackingConfig, TrainConfig
from gptoss_dist.parallel.mesh import DeviceLayout
from gptoss_dist.tracking.about.revision import git_revision
from gptoss_dist.tracking.delivery.requests import NOTE_TAG
from gptoss_dist.tracking.jsonl import read_lines
from gptoss_dist.tracking.profiling import profiled
from gptoss_dist.tracking.recorded.run import read_run
from gptoss_dist.tracking.records import JOURNAL_FILE, Checkpoint, operation
from gptoss_dist.train.periodic import periodic_tasks, write_samples
from gptoss_dist.train.report import LaunchedStep, Report
from gptoss_dist.train.run import Run
from gptoss_dist.train.start import Start


def open_report(folder, plots=False, start=None):
    settings = Config(
        model=ModelConfig(num_hidden_layers=1),
        run=RunConfig(dir=str(folder)),
        tracking=TrackingConfig(mlflow=False, plots=plots),
    )
    settings.save(folder / "config.yaml")
    ranks = SimpleNamespace(world_size=1, device=torch.device("cpu"), hosts=("a",))
    mixture = SimpleNamespace(
        manifest_sha256="0", changes=[], sources=[None], weights={"all": 1.0}, usage=lambda position: []
    )
    engine = SimpleNamespace(name="fsdp", layout=DeviceLayout(1, 1, 1))
    return Report(settings, ranks, engine, SimpleNamespace(mixture=mixture, history=[]), start or Start())


def test_samples_of_any_text_are_kept_under_an_ascii_locale(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stderr", terminal)
    report = open_report(tmp_path)
    report.samples(5, ["naïve 猫", "half \ud83d"])
    report.message("naïve")
    report.message("the display goes on")
    report.close("FINISHED")
    text = (tmp_path / "samples" / "step_00000005.txt").read_text(encoding="utf-8")
    assert text == "naïve 猫\n\n----\n\nhalf \\ud83d\n"
    shown = terminal.buffer.getvalue().decode()
    assert "na\\xefve \\u732b" in shown and "the display goes on" in shown


@pytest.mark.parametrize("status, words", [("FINISHED", "finished"), ("FAILED", "failed"), ("rewind", None)])
def test_a_run_ends_with_its_report(tmp_path, status, words, capsys):
    report = open_report(tmp_path)
    report.tracker.log(3, {"loss/train": 1.25})
    if status == "rewind":
        report.rewound({"first": 8, "end": 16, "order": "a", "step": 3, "rewound_to": 2, "reason": "a spike"})
    report.close("KILLED" if status == "rewind" else status)
    page, said = tmp_path / "report.html", capsys.readouterr().err
    assert page.exists() == (words is not None) == ("the run's report is" in said)
    if words:
        assert f'<p class="subtitle">{words}' in (text := page.read_text()) and "1.2500" in text
        assert '"report.html"' in (tmp_path / "tracking/journal.jsonl").read_text(), "MLflow gets it"


def test_the_end_is_recorded_before_pictures_are_drawn(tmp_path, monkeypatch):
    """Who asks a run to stop may kill it then."""
    report, seen = open_report(tmp_path, plots=True), []
    report.tracker.log(3, {"loss/train": 1.25})

    def draw(*arguments):
        seen.append(read_run(tmp_path))

    monkeypatch.setattr("gptoss_dist.train.report.plot_run", lambda *arguments: draw() or [])
    monkeypatch.setattr("gptoss_dist.train.report.write_in_time", draw)
    report.close("KILLED", "a signal")
    assert [(run.status, run.tags["state"], run.events[-1].kind) for run in seen] == 2 * [("KILLED", "stopped", "stop")]


def test_a_run_that_ends_before_its_first_step_has_no_metrics(tmp_path):
    open_report(tmp_path).close("FAILED", "no memory")
    assert len(read_run(tmp_path).columns.steps) == 0


@pytest.mark.parametrize("left", [0, 1])
def test_a_run_is_resumed_only_if_steps_are_left(tmp_path, left):
    start = Start(checkpoint=tmp_path / "checkpoint", step=TrainConfig().steps - left)
    open_report(tmp_path, start=start).close("FINISHED")
    assert [event.kind for event in read_run(tmp_path).events] == left * ["resume"] + ["end"]


def test_a_run_that_goes_back_shows_where_it_went(tmp_path):
    report = open_report(tmp_path)
    report.validation(5, 3.0, {})
    report.rewound({"first": 8, "end": 16, "order": "a", "step": 9, "rewound_to": 4, "reason": "a spike"})
    report.close("KILLED")
    start = Start(checkpoint=tmp_path / "step_00000004", step=4, tokens=4, skipped_steps=2, rewound=True)
    report = open_report(tmp_path, start=start)
    report.tracker.log(5, {"loss/train": 4.0})
    report.close("FINISHED")
    recorded = read_run(tmp_path)
    assert recorded.columns.steps.tolist() == [4, 5] and recorded.columns["events/rewind"][0] == 1
    assert recorded.tags["best_val_loss"] == "none yet" and "2 skipped" in recorded.tags[NOTE_TAG]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "place, kind",
    [
        ("samples", "folder"),
        ("samples", "file"),
        ("samples", "full disk"),
        ("plots", "folder"),
        ("plots", "file"),
        ("plots", "full disk"),
        ("metrics.jsonl", "folder"),
        ("tracking", "file"),
        ("expert_tokens.jsonl", "folder"),
        ("report.html", "folder"),
        ("profile", "file"),
        ("profile", "folder"),
    ],
)
def test_what_cannot_be_written_is_told_and_the_run_goes_on(tmp_path, place, kind, capsys):
    path = tmp_path / place
    match kind:
        case "folder":
            for name in ("step_00000005.txt", "overview.png", "loss.png", "kernels_00000001.txt"):
                (path / name).mkdir(parents=True)
        case "file":
            path.write_text("in the way")
        case "full disk":
            path.symlink_to("/dev/full")
    report = open_report(tmp_path, plots=place == "plots")
    report.tracker.log(1, {"loss/train": 1.0})
    report.samples(5, ["text"])
    report.plots()
    with profiled(tmp_path / "profile", 1, torch.device("cpu")):
        pass
    report.close("FINISHED")
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_knows_the_source_of_its_code(tmp_path):
    report = open_report(tmp_path)
    report.close("FINISHED")
    journal = (tmp_path / "tracking" / "journal.jsonl").read_text()
    if git_revision() != "unknown":
        assert '"mlflow.source.git.commit": "' in journal
    assert '"mlflow.source.type": "LOCAL"' in journal and '"mlflow.user": "' in journal


def test_code_in_an_image_knows_what_it_was_built_from(tmp_path, monkeypatch):
    file = tmp_path / "gptoss_dist/tracking/about/revision.py"
    file.parent.mkdir(parents=True)
    monkeypatch.setattr("gptoss_dist.tracking.about.revision.__file__", str(file))
    assert git_revision.__wrapped__() == "unknown"
    (tmp_path / "revision.txt").write_text("0123456789ab-dirty\n")
    assert git_revision.__wrapped__() == "0123456789ab-dirty"


def test_one_process_of_each_further_machine_measures_it(tmp_path):
    """Rank 0's machine is measured by its tracker."""
    measured = []
    for rank in range(6):
        ranks = SimpleNamespace(rank=rank, hosts=("a", "a", "b", "b", "c", "c"))
        config = SimpleNamespace(folder=tmp_path, tracking=TrackingConfig(system_metrics_every_s=60))
        run = SimpleNamespace(ranks=ranks, config=config, _node=None)
        Run.monitor_node(run)
        if run._node is not None:
            measured.append(rank)
            run._node.close()
    assert measured == [2, 4]


def result_of(loss, skipped=False):
    zero = torch.zeros(())
    return SimpleNamespace(
        loss=torch.tensor(loss),
        aux=zero,
        z=zero,
        grad_norm=torch.ones(()),
        skipped=torch.tensor(float(skipped)),
        entropy_L=torch.zeros(1),
        counts_LE=torch.ones(1, 32),
        traffic_R3=None,
    )


def test_what_happens_to_a_run_is_in_its_journal_and_its_note(tmp_path):
    report = open_report(tmp_path)
    report.plan(0, 8)
    for step in range(1, 5):
        result = result_of(float("nan") if step == 3 else 4.0, skipped=step == 3)
        report.step(LaunchedStep(step, result, 1e-3, {"perf/step_ms": 10.0}, 8 * step), skipped=int(step >= 3))
    report.validation(4, 3.5, {})
    report.saved(4, 0.1)
    records = [operation(line) for line, _ in read_lines(tmp_path / JOURNAL_FILE)]
    (saved,) = [record for record in records if isinstance(record, Checkpoint)]
    assert saved.metrics == pytest.approx({"loss/val": 3.5, "loss/val_ppl": math.exp(3.5)})
    report.close("FAILED", "https://me:secret@host said\nno")
    recorded = read_run(tmp_path)
    told = [(event.step, event.kind, event.text) for event in recorded.events]
    assert [(step, kind) for step, kind, _ in told] == [(0, "start"), (3, "skipped"), (4, "checkpoint"), (4, "error")]
    assert "loss nan" in told[1][2] and "samples 16 to 23" in told[1][2]
    assert told[3][2].startswith("failed at step 4: https://") and "secret" not in told[3][2]
    assert recorded.tags["state"] == "failed" and recorded.tags["best_val_loss"] == "3.5000"
    note = recorded.tags["mlflow.note.content"]
    assert "**failed**, step 4" in note and "best **3.5000** at step 4" in note and "- 1 skipped: step 3" in note
    columns = recorded.columns
    told = [columns["events/skipped"][row] for row in range(4)]
    assert told == [0, 0, 1, 1], "at the first step, before it, at it, at the end"
    assert np.nanmax(columns["events/rewind"]) == 0, "what never happened is zero, not missing"
    tokens, exaflops = columns["progress/tokens"], columns["progress/exaflops"]
    assert exaflops[-1] == pytest.approx(tokens[-1] * float(recorded.tags["flops_per_token"]) / 1e18)
    assert columns["progress/val_tokens"][-1] == tokens[-1] and columns["loss/val_best"][-1] == 3.5


def test_the_note_is_written_now_and_then_and_after_events_soon(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("gptoss_dist.train.report.time.monotonic", lambda: clock[0])
    report = open_report(tmp_path)

    def notes_after(seconds, events=0):
        clock[0] += seconds
        before = len(notes)
        for _ in range(events):
            report.event(5, "data", "new")
        report.step(LaunchedStep(5, result_of(4.0), 1e-3, {}, 8), skipped=0)
        return len(notes) - before

    notes = []
    monkeypatch.setattr(report.tracker, "tag", lambda key, value: notes.append(value) if key == NOTE_TAG else None)
    assert notes_after(200) == 1, "that of the start event was put off"
    assert notes_after(1, events=9) == 0
    assert notes_after(28) == 0
    assert notes_after(1) == 1
    assert notes_after(299) == 0
    assert notes_after(1) == 1
    report.close("FINISHED")
    assert "**finished**" in notes[-1]


@pytest.mark.parametrize("every, prompts, written", [(0, ["a"], False), (5, ["a"], True), (5, [], False)])
def test_no_samples_are_written_every_0_steps(every, prompts, written):
    config = Config(model=ModelConfig(), sampling=SamplingConfig(every=every, prompts=prompts))
    assert (write_samples in [task.do for task in periodic_tasks(config)]) == written
