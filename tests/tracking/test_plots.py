"""Plots come out of metrics.jsonl as real pictures, with what is missing left out."""

import json
import math
import random

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from gptoss_dist.tracking.pages.thinning import averaged
from gptoss_dist.tracking.plots import _Run, plot_run

LAYERS = 3


def write_run(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def training_rows(first, last, seed=0):
    rng = random.Random(seed)
    for step in range(first, last + 1):
        loss = 3 + 7 * math.exp(-step / 200) + rng.gauss(0, 0.05)
        metrics = {
            "loss/train": loss,
            "loss/train_ppl": math.exp(loss),
            "optim/lr": 4e-4 * min(1, step / 100),
            "optim/grad_norm": 1 + abs(rng.gauss(0, 0.1)),
            "perf/tokens_per_s": 5.0 if step == first else 5000 + rng.gauss(0, 50),
            "progress/tokens": step * 131_072,
            "moe/load_max_over_mean": 1.5,
            "moe/dead_experts": 0.0,
        }
        for layer in range(LAYERS):
            metrics[f"moe/load_max_over_mean/layer_{layer}"] = 1.2 + 0.1 * layer
            metrics[f"moe/load_cv/layer_{layer}"] = 0.2
        yield {"step": step, "time": 1.7e9 + step, "metrics": metrics}


def full_run(folder):
    rows = [{"step": 0, "time": 1.7e9, "metrics": {"loss/val": 10.1, "loss/val_ppl": 25_000.0}}]
    rows += training_rows(1, 700)
    rows += [{"event": "resume", "step": 600, "time": 1.7e9}]
    rows += training_rows(601, 2000, seed=1)
    rows += [
        {"step": step, "time": 1.7e9 + step, "metrics": {"loss/val": 3.2, "loss/val_ppl": 24.5}}
        for step in (1000, 2000)
    ]
    rows += [{"step": 2001, "time": 1.7e9 + 2001, "metrics": {"loss/train": "NaN", "optim/grad_norm": "Infinity"}}]
    rows += [{"event": "resume", "step": 2001, "time": 1.7e9 + 2001}]  # a finished run, started again
    return write_run(folder, rows)


def test_all_figures_are_pictures_with_ink(tmp_path):
    backend = matplotlib.get_backend()
    files = plot_run(full_run(tmp_path / "run"))
    names = ["overview", "loss", "perplexity", "lr", "throughput", "tokens", "expert_load"]
    assert files == [tmp_path / "run" / "plots" / f"{name}.png" for name in names]
    assert sorted(files) == sorted((tmp_path / "run" / "plots").iterdir()), "no temporary file stays"
    for path in files:
        pixels = imread(path)[..., :3]
        assert min(pixels.shape[:2]) > 400
        assert 0.005 < (pixels < 0.9).any(axis=-1).mean() < 0.5, path
        colourful = np.ptp(pixels, axis=-1) > 0.3
        assert colourful.mean() > 0.0005, f"{path} shows axes but no curve"
    assert matplotlib.get_backend() == backend


def test_curves_bands_validation_and_resume_marker(tmp_path, monkeypatch):
    figures = {}
    save = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, path, **kw: (figures.update({path.name.split(".")[1]: self}), save(self, path, **kw)),
    )
    plot_run(full_run(tmp_path / "run"))
    billions = 131_072 / 1e9

    axes = figures["loss"].axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert len(axes.collections) == 1, "the min-max band"
    x = lines["training"].get_xdata()
    assert 1000 <= len(x) <= 1500, "thinned from 2000 points"
    assert lines["training"].get_ydata()[-1] == pytest.approx(3, abs=0.05)
    assert np.isfinite(lines["training"].get_ydata()).all(), "NaN losses are left out"
    assert lines["validation"].get_xdata() == pytest.approx([0, 1000 * billions, 2000 * billions])
    dotted = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in dotted] == pytest.approx([600 * billions])
    assert figures["loss"].get_suptitle() == "run · step 2001 · resumed at step 600"

    throughput = figures["throughput"].axes[0]
    assert throughput.collections[0].get_datalim(throughput.transData).y0 > 4.5, "warm-up steps are not drawn"
    assert throughput.get_ylim()[0] == 0
    assert figures["perplexity"].axes[0].get_yscale() == "log"
    tokens = figures["tokens"].axes[0].get_lines()[0]
    assert tokens.get_ydata()[-1] == 2000 * 131_072
    assert tokens.get_xdata()[-1] == pytest.approx(2000 / 3600)
    load = figures["expert_load"].axes[0]
    assert [round(line.get_ydata()[0], 2) for line in load.get_lines()[:LAYERS]] == [1.2, 1.3, 1.4]
    assert [axes.get_title() != "" for axes in figures["overview"].axes] == [True] * 6


def test_missing_metrics_leave_their_files_out(tmp_path):
    rows = [{"step": 1, "time": 1.0, "metrics": {"loss/train": 4.0}}]
    files = plot_run(write_run(tmp_path / "run", rows))
    assert [path.stem for path in files] == ["overview", "loss"]
    rows.append({"step": 2, "time": 2.0, "metrics": {"perf/tokens_per_s": 7.0}})
    assert [path.stem for path in plot_run(write_run(tmp_path / "run", rows))] == ["overview", "loss", "throughput"]
    with pytest.raises(ValueError, match="no metrics"):
        plot_run(write_run(tmp_path / "empty", []))


@pytest.mark.heavy
def test_expert_tokens_are_a_map_of_the_newest_row(tmp_path, monkeypatch):
    figures = {}
    save = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, path, **kw: (figures.update({path.name.split(".")[1]: self}), save(self, path, **kw)),
    )
    run = write_run(tmp_path / "run", [{"step": 200, "time": 1.0, "metrics": {"loss/train": 4.0}}])
    rows = [
        {"first_step": 1, "step": 100, "tokens": [[1, 1, 1, 1]] * 2},
        {"first_step": 101, "step": 200, "tokens": [[30, 10, 0, 0], [0, 0, 0, 0]]},
    ]
    (run / "expert_tokens.jsonl").write_text("")
    assert "expert_tokens" not in [path.stem for path in plot_run(run)], "no row yet"
    (run / "expert_tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = plot_run(run)
    assert files[-1] == run / "plots" / "expert_tokens.png"
    assert sorted(files) == sorted((run / "plots").iterdir()), "no temporary file stays"
    axes, colour_bar = figures["expert_tokens"].axes
    (image,) = axes.get_images()
    assert image.get_array().tolist() == [[3, 1, 0, 0], [0, 0, 0, 0]], "a layer without tokens is no 0 / 0"
    assert image.get_clim() == (0, 3) and "1 = even" in colour_bar.get_ylabel()
    assert figures["expert_tokens"].get_suptitle() == "run · steps 101 to 200"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("expert", "layer")
    pixels = imread(files[-1])[..., :3]
    assert (np.ptp(pixels, axis=-1) > 0.3).mean() > 0.1, "colours"


def test_axis_is_steps_without_token_counts(tmp_path):
    rows = [{"step": step, "time": 1.0, "metrics": {"loss/train": 4.0}} for step in (3, 8)]
    run = _Run.read(write_run(tmp_path / "run", rows))
    assert run.axis_label == "step" and run.points("loss/train")[0].tolist() == [3, 8]


def test_average_starts_at_the_first_value_and_follows():
    y = np.concatenate([np.full(500, 8.0), np.full(500, 2.0)])
    smooth = averaged(y, 100)
    assert (smooth[:500] == 8).all()
    assert 2 < smooth[510] < 6 and smooth[-1] == pytest.approx(2, abs=1e-6)
