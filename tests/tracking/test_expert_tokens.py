"""Rows of each expert's tokens: windows, resume, and the warning about experts that get none."""

import json
from types import SimpleNamespace

import pytest
import torch

from gptoss_dist.config import Config, ModelConfig, RunConfig, TrackingConfig
from gptoss_dist.parallel.mesh import DeviceLayout
from gptoss_dist.tracking.expert_tokens import ExpertTokens, read_expert_tokens
from gptoss_dist.tracking.plots import plot_run
from gptoss_dist.train.report import LaunchedStep, Report
from gptoss_dist.train.start import Start

FILE = "expert_tokens.jsonl"


def feed(tokens, first, last, counts_LE=((1.0, 2.0), (3.0, 0.0))):
    """Steps first..last of equal counts; returns the warnings."""
    said = [tokens.add(step, torch.tensor(counts_LE)) for step in range(first, last + 1)]
    return [text for text in said if text]


def spans(folder):
    return [(row["first_step"], row["step"]) for row in read_expert_tokens(folder)]


def test_rows_are_sums_of_windows_and_the_rest_comes_at_close(tmp_path):
    tokens = ExpertTokens(tmp_path, 3)
    feed(tokens, 1, 7)
    assert spans(tmp_path) == [(1, 3), (4, 6)]
    tokens.close()
    tokens.close()
    assert [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()] == [
        {"first_step": 1, "step": 3, "tokens": [[3, 6], [9, 0]]},
        {"first_step": 4, "step": 6, "tokens": [[3, 6], [9, 0]]},
        {"first_step": 7, "step": 7, "tokens": [[1, 2], [3, 0]]},
    ]
    assert read_expert_tokens(tmp_path)[2] == {"first_step": 7, "step": 7, "tokens": [[1, 2], [3, 0]]}


def test_nothing_is_left_for_close_after_a_full_window(tmp_path):
    tokens = ExpertTokens(tmp_path, 2)
    feed(tokens, 1, 2)
    tokens.close()
    assert spans(tmp_path) == [(1, 2)]


def test_sums_are_exact_and_the_callers_tensor_is_left_alone(tmp_path):
    tokens = ExpertTokens(tmp_path, 3)
    for step, value in ((1, 2**24), (2, 1), (3, 1)):  # float32 ends at 2**24
        tokens.add(step, torch.tensor([[float(value)]]))
    assert read_expert_tokens(tmp_path)[0]["tokens"] == [[2**24 + 2]]
    counts_LE = torch.ones(1, 1, dtype=torch.int64)
    for step in (4, 5):
        tokens.add(step, counts_LE)
    assert counts_LE.item() == 1


def test_only_a_row_reads_the_device(tmp_path):
    tokens = ExpertTokens(tmp_path, 3)
    unreadable = torch.ones(2, 2, device="meta")  # has no data: any reading raises
    assert tokens.add(1, unreadable) is None and tokens.add(2, unreadable) is None
    with pytest.raises((NotImplementedError, RuntimeError)):
        tokens.add(3, unreadable)


def test_rows_of_an_abandoned_branch_do_not_count(tmp_path):
    feed(ExpertTokens(tmp_path, 3), 1, 9)  # killed: no close
    resumed = ExpertTokens(tmp_path, 3, resumed_step=5)
    assert spans(tmp_path) == [(1, 3)], "a row that ends beyond the checkpoint is gone at once"
    feed(resumed, 6, 10)
    resumed.close()
    assert spans(tmp_path) == [(1, 3), (6, 6), (7, 9), (10, 10)]
    assert json.loads((tmp_path / FILE).read_text().splitlines()[3]) == {"event": "resume", "step": 5}


def test_a_run_that_closed_at_its_checkpoint_goes_on_without_a_gap(tmp_path):
    first = ExpertTokens(tmp_path, 4)
    feed(first, 1, 6)
    first.close()
    feed(ExpertTokens(tmp_path, 4, resumed_step=6), 7, 8)
    assert spans(tmp_path) == [(1, 4), (5, 6), (7, 8)]


def test_a_torn_line_costs_itself_only(tmp_path):
    feed(ExpertTokens(tmp_path, 1), 1, 3)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-9])
    assert spans(tmp_path) == [(1, 1), (2, 2)]
    feed(ExpertTokens(tmp_path, 1, resumed_step=2), 3, 4)
    assert spans(tmp_path) == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_fresh_start_moves_the_earlier_file_aside_under_the_number_of_its_metrics(tmp_path):
    for steps in (1, 2):
        feed(ExpertTokens(tmp_path, 1), 1, steps)
    assert spans(tmp_path) == [(1, 1), (2, 2)]
    assert len((tmp_path / "expert_tokens.1.jsonl").read_text().splitlines()) == 1
    for n in (1, 2):
        (tmp_path / f"metrics.{n}.jsonl").touch()
    ExpertTokens(tmp_path, 0)
    assert len((tmp_path / "expert_tokens.3.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / FILE).exists()


def test_zero_writes_no_rows_but_marks_abandoned_ones(tmp_path):
    silent = ExpertTokens(tmp_path, 0)
    assert feed(silent, 1, 200) == []
    silent.close()
    with pytest.raises(ValueError, match="expert_tokens_every > 0"):
        read_expert_tokens(tmp_path)
    feed(ExpertTokens(tmp_path, 1), 1, 3)
    silent = ExpertTokens(tmp_path, 0, resumed_step=2)
    feed(silent, 3, 5)
    silent.close()
    assert spans(tmp_path) == [(1, 1), (2, 2)]
    with pytest.raises(ValueError, match=r"tracking\.expert_tokens_every"):
        config(tmp_path, every=-1)


def test_dead_experts_are_named_once_and_again_when_others_die(tmp_path):
    tokens = ExpertTokens(tmp_path, 2)
    assert feed(tokens, 1, 4) == [
        "step 2: 1 of 4 experts got no token in the last 2 steps (layer 1: 1); raise loss.aux_coef, or train with "
        "model.router_selection_bias and loss.selection_bias_rate"
    ]
    (text,) = feed(tokens, 5, 8, ((0.0, 2.0), (3.0, 0.0)))
    assert text.startswith("step 6: 2 of 4 experts got no token in the last 2 steps (layer 0: 0; layer 1: 1);")
    assert feed(tokens, 9, 10, ((1.0, 2.0), (3.0, 1.0))) == []
    assert len(feed(tokens, 11, 12, ((0.0, 2.0), (3.0, 0.0)))) == 1, "they had been alive in between"


def test_an_expert_is_dead_only_without_a_token_in_a_whole_window(tmp_path):
    tokens = ExpertTokens(tmp_path, 3, resumed_step=1)
    assert feed(tokens, 2, 3) == [], "a shorter window says little"
    assert feed(tokens, 4, 5) + feed(tokens, 6, 6, ((0.0, 0.0), (0.0, 1.0))) == []
    assert feed(tokens, 7, 8) == []
    tokens.close()


def test_long_lists_of_dead_experts_are_cut(tmp_path):
    (text,) = feed(ExpertTokens(tmp_path, 1), 1, 1, torch.zeros(2, 6).tolist())
    assert "12 of 12 experts" in text and "(layer 0: 0, 1, 2, 3, 4, 5; layer 1: 0, 1, ...);" in text
    (text,) = feed(ExpertTokens(tmp_path, 1), 1, 1, torch.zeros(1, 8).tolist())
    assert "(layer 0: 0, 1, 2, 3, 4, 5, 6, 7);" in text


def config(folder, every):
    return Config(
        model=ModelConfig(num_hidden_layers=2),
        run=RunConfig(dir=str(folder)),
        tracking=TrackingConfig(mlflow=False, expert_tokens_every=every),
    )


def report_steps(folder, start, last):
    settings = config(folder, every=2)
    settings.save(folder / "config.yaml")
    ranks = SimpleNamespace(world_size=1, device=torch.device("cpu"), hosts=("a",))
    mixture = SimpleNamespace(manifest_sha256="0", changes=[], usage=lambda position: [], weights={"all": 1.0})
    data = SimpleNamespace(mixture=mixture, history=[])
    engine = SimpleNamespace(name="fsdp", layout=DeviceLayout(1, 1, 1))
    report = Report(settings, ranks, engine, data, Start(step=start))
    zero = torch.zeros(())
    counts_LE = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    result = SimpleNamespace(
        loss=zero,
        aux=zero,
        z=zero,
        grad_norm=torch.ones(()),
        entropy_L=torch.zeros(2),
        counts_LE=counts_LE,
        traffic_R3=None,
        skipped=torch.zeros(()),
    )
    for step in range(start + 1, last + 1):
        report.step(LaunchedStep(step, result, 1e-3, {}, samples_consumed=0), skipped=0)
    return report


@pytest.mark.heavy
def test_report_writes_warns_resumes_and_plots(tmp_path, capsys):
    report_steps(tmp_path, 0, 4)  # killed
    assert capsys.readouterr().err.count("1 of 4 experts got no token in the last 2 steps (layer 0: 1)") == 1
    report = report_steps(tmp_path, 3, 5)
    report.close("FINISHED")
    assert spans(tmp_path) == [(1, 2), (4, 4), (5, 5)]
    assert (tmp_path / "plots" / "expert_tokens.png").is_file()
    report_steps(tmp_path, 0, 1).close("FINISHED")
    assert {path.name for path in tmp_path.glob("*.1.jsonl")} == {"metrics.1.jsonl", "expert_tokens.1.jsonl"}
    assert spans(tmp_path) == [(1, 1)]


@pytest.mark.heavy
def test_a_broken_device_does_not_hide_how_the_run_ended(tmp_path, monkeypatch):
    report = report_steps(tmp_path, 0, 1)

    def fail():
        raise RuntimeError("device lost")

    monkeypatch.setattr(report.expert_tokens, "_write", fail)
    report.close("FAILED")
    assert spans(tmp_path) == []
    assert (tmp_path / "plots" / "overview.png") in plot_run(tmp_path)
