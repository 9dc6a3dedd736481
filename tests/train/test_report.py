"""Nothing that a run records beside its metrics ends it."""

import io
from types import SimpleNamespace

import pytest
import torch

from gptoss_dist.config import Config, ModelConfig, RunConfig, SamplingConfig, TrackingConfig
from gptoss_dist.parallel.mesh import DeviceLayout
from gptoss_dist.tracking.about.revision import git_revision
from gptoss_dist.tracking.profiling import profiled
from gptoss_dist.train.periodic import periodic_tasks, write_samples
from gptoss_dist.train.report import Report
from gptoss_dist.train.start import Start


def open_report(folder, plots=False):
    settings = Config(
        model=ModelConfig(num_hidden_layers=1),
        run=RunConfig(dir=str(folder)),
        tracking=TrackingConfig(mlflow=False, plots=plots),
    )
    settings.save(folder / "config.yaml")
    ranks = SimpleNamespace(world_size=1, device=torch.device("cpu"))
    mixture = SimpleNamespace(manifest_sha256="0", changes=[], usage=lambda position: [])
    engine = SimpleNamespace(name="fsdp", layout=DeviceLayout(1, 1, 1))
    return Report(settings, ranks, engine, SimpleNamespace(mixture=mixture, history=[]), Start())


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
        report.rewound(dict(first=8, end=16, order="a", step=3, rewound_to=2, reason="a spike"))
    report.close("KILLED" if status == "rewind" else status)
    page, said = tmp_path / "report.html", capsys.readouterr().err
    assert page.exists() == (words is not None) == ("the run's report is" in said)
    if words:
        assert f'<p class="subtitle">{words}' in (text := page.read_text()) and "1.2500" in text
        assert '"report.html"' in (tmp_path / "tracking/journal.jsonl").read_text(), "MLflow gets it"


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


@pytest.mark.parametrize("every, prompts, written", [(0, ["a"], False), (5, ["a"], True), (5, [], False)])
def test_no_samples_are_written_every_0_steps(every, prompts, written):
    config = Config(model=ModelConfig(), sampling=SamplingConfig(every=every, prompts=prompts))
    assert (write_samples in [task.do for task in periodic_tasks(config)]) == written
