"""Pictures of a run, drawn from its `metrics.jsonl` and `expert_tokens.jsonl` as PNG files."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.disk import replacing
from gptoss_dist.tracking.expert_tokens import EXPERT_TOKENS_FILE, read_expert_tokens
from gptoss_dist.tracking.pages.thinning import averaged, thin, warmed_up
from gptoss_dist.tracking.recorded.columns import read_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_MAX_POINTS = 1500
"""Bins that a curve is thinned to: about the pixels across a panel."""
_AVERAGED_PARTS = 100
"""The line is an average over one of so many parts of a curve."""


def plot_run(run_dir: str | Path, message: Callable[[str], None] = logger.warning) -> list[Path]:
    """Draw `run_dir/metrics.jsonl`, and `expert_tokens.jsonl` where there is one, into `run_dir/plots`.

    Curves show the range (band) and an exponential moving average (line); dotted lines mark where training was resumed.
    A metric that was never logged leaves its panel empty and its own file out.

    Args:
        run_dir: Folder of the run.
        message: What is told how many lines are damaged, if any is.

    Returns:
        The files written: `overview.png`, and of `loss`, `perplexity`, `lr`, `throughput`, `tokens`, `expert_load` and
        `expert_tokens` those that have data.

    Raises:
        ValueError: The folder has no metrics.
    """
    run_dir = Path(run_dir)
    run = _Run.read(run_dir, message)
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    files = [_save(folder / "overview.png", run, _OVERVIEW, columns=3)]
    for name, panels in _FIGURES.items():
        if any(run.has(panel.metric) for panel in panels):
            files.append(_save(folder / f"{name}.png", run, panels, columns=1))
    if (run_dir / EXPERT_TOKENS_FILE).exists() and (rows := read_expert_tokens(run_dir, message)):
        files.append(_save_expert_tokens(folder / "expert_tokens.png", run, rows[-1]))
    return files


@dataclass(frozen=True)
class _Panel:
    title: str
    metric: str
    """The metric drawn, or the prefix of the per-layer metrics where it ends in `/layer_`."""
    draw: Callable[[Axes, _Run, _Panel], None]
    log: bool = False
    from_zero: bool = False
    scale: float = 1.0
    validation: str | None = None


@dataclass(frozen=True)
class _Run:
    title: str
    steps: np.ndarray
    hours: np.ndarray
    """Wall-clock time since the first row."""
    series: Mapping[str, np.ndarray]
    """One value per step and metric; NaN where a step did not log it."""
    resumes: list[int]

    @classmethod
    def read(cls, run_dir: Path, message: Callable[[str], None] = logger.warning) -> _Run:
        columns = read_columns(run_dir, message)
        if not len(columns.steps):
            raise ValueError(f"{run_dir} has no metrics to plot yet")
        hours = (columns.times - columns.times[0]) / 3600
        resumes = [step for step in columns.resumes if step < columns.steps[-1]]  # not a finished run's new start
        return cls(run_dir.resolve().name, columns.steps.astype(float), hours, columns, resumes)

    def has(self, metric: str) -> bool:
        return any(np.isfinite(self.series[name]).any() for name in self.matching(metric))

    def matching(self, metric: str) -> list[str]:
        """Return the metric itself, or all layers of it in order."""
        if not metric.endswith("/layer_"):
            return [metric] if metric in self.series else []
        names = [name for name in self.series if re.fullmatch(re.escape(metric) + r"\d{1,9}", name)]
        return sorted(names, key=lambda name: int(name.removeprefix(metric)))

    def position(self, steps: np.ndarray) -> np.ndarray:
        """Return where steps lie on the horizontal axis: tokens in `token_unit`s if they were logged, or steps."""
        if not self.has("progress/tokens"):
            return steps
        tokens = self.series["progress/tokens"]
        known = np.isfinite(tokens)
        # Step 0 (a validation before training) has seen no token.
        return np.interp(steps, np.append(0, self.steps[known]), np.append(0, tokens[known])) / self.token_unit

    @property
    def token_unit(self) -> float:
        return 1e9 if np.nanmax(self.series["progress/tokens"]) >= 1e8 else 1e6

    @property
    def axis_label(self) -> str:
        if not self.has("progress/tokens"):
            return "step"
        return "tokens (billions)" if self.token_unit == 1e9 else "tokens (millions)"

    def points(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Return positions and finite values of one metric."""
        values = self.series[metric]
        known = np.isfinite(values)
        if metric.startswith("perf/"):  # in a moving average the first step of a process would look like a ramp
            known[known] = warmed_up(self.steps[known], self.resumes)
        return self.position(self.steps[known]), values[known]


def _band(axes: Axes, run: _Run, panel: _Panel) -> None:
    x, y = run.points(panel.metric)
    y = y * panel.scale
    bins = thin(y, _MAX_POINTS)
    last = bins.last
    axes.fill_between(x[last], bins.low, bins.high, alpha=0.25, linewidth=0)
    axes.plot(
        x[last],
        averaged(y, _AVERAGED_PARTS)[last],
        linewidth=1.5,
        marker="." if len(x) == 1 else None,
        label="training",
    )
    if panel.validation and run.has(panel.validation):
        axes.plot(*run.points(panel.validation), "o-", color="C3", markersize=3, linewidth=1, label="validation")
        axes.legend()


def _line(axes: Axes, run: _Run, panel: _Panel) -> None:
    x, y = run.points(panel.metric)
    every = max(1, len(x) // _MAX_POINTS)
    axes.plot(x[::every], panel.scale * y[::every], color="C2")


def _layers(axes: Axes, run: _Run, panel: _Panel) -> None:
    """Draw one average per layer, coloured by depth."""
    from matplotlib import colormaps

    names = run.matching(panel.metric)
    for index, name in enumerate(names):
        x, y = run.points(name)
        every = max(1, len(x) // _MAX_POINTS)
        labelled = index in (0, len(names) - 1)
        axes.plot(
            x[::every],
            averaged(y, _AVERAGED_PARTS)[::every],
            color=colormaps["viridis"](index / max(1, len(names) - 1)),
            linewidth=1,
            label=f"layer {name.removeprefix(panel.metric)}" if labelled else None,
        )
    axes.legend()


def _over_time(axes: Axes, run: _Run, panel: _Panel) -> None:
    y = run.series[panel.metric]
    known = np.isfinite(y)
    every = max(1, int(known.sum()) // _MAX_POINTS)
    axes.plot(run.hours[known][::every], panel.scale * y[known][::every], color="C6")
    axes.set_xlabel("hours since the first step")


_LOSS = _Panel("loss (band: range, line: average)", "loss/train", _band, validation="loss/val")
_PERPLEXITY = _Panel("perplexity", "loss/train_ppl", _band, log=True, validation="loss/val_ppl")
_LR = _Panel("learning rate", "optim/lr", _line, from_zero=True)
_THROUGHPUT = _Panel("throughput (thousand tokens/s)", "perf/tokens_per_s", _band, from_zero=True, scale=1e-3)
_GRAD_NORM = _Panel("gradient norm", "optim/grad_norm", _band, log=True)
_LOAD = _Panel("expert load, max over mean, worst layer", "moe/load_max_over_mean", _band)
_OVERVIEW = (_LOSS, _PERPLEXITY, _LR, _THROUGHPUT, _GRAD_NORM, _LOAD)
_FIGURES = {
    "loss": (_LOSS,),
    "perplexity": (_PERPLEXITY,),
    "lr": (_LR,),
    "throughput": (_THROUGHPUT,),
    "tokens": (_Panel("tokens seen", "progress/tokens", _over_time, from_zero=True),),
    "expert_load": (
        _Panel("expert load, max over mean", "moe/load_max_over_mean/layer_", _layers),
        _Panel("expert load, coefficient of variation", "moe/load_cv/layer_", _layers),
        _Panel("experts without a token, all layers", "moe/dead_experts", _line),
    ),
}


def _save(path: Path, run: _Run, panels: tuple[_Panel, ...], columns: int) -> Path:
    # Figure without pyplot: it draws with Agg, keeps no global state and leaves a notebook's backend alone.
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    width, height = (15, 3.75 * rows) if columns > 1 else (8, 4.5 * rows)
    figure = Figure(figsize=(width, height))
    # Margins in inches. A layout engine would find them by drawing everything twice.
    figure.subplots_adjust(0.8 / width, 0.6 / height, 1 - 0.2 / width, 1 - 0.8 / height, wspace=0.25, hspace=0.35)
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels):
        axes.set_title(panel.title)
        axes.grid(alpha=0.3)
        axes.set_xlabel(run.axis_label)
        if not run.has(panel.metric):
            axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes)
            continue
        panel.draw(axes, run, panel)
        if panel.log:
            axes.set_yscale("log")
        if panel.from_zero:
            axes.set_ylim(bottom=0)
        if panel.draw is not _over_time:
            for position in run.position(np.array(run.resumes, dtype=float)):
                axes.axvline(position, color="black", linestyle=":", linewidth=0.8)
    resumed = f" · resumed at step {', '.join(map(str, run.resumes))}" if run.resumes else ""
    figure.suptitle(f"{run.title} · step {int(run.steps[-1])}{resumed}")
    return _write(path, figure)


def _save_expert_tokens(path: Path, run: _Run, row: dict) -> Path:
    """Draw one row of `expert_tokens.jsonl`: layers x experts, relative to an even share of the layer's tokens."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    tokens_LE = np.array(row["tokens"], dtype=float)
    share_LE = tokens_LE / np.maximum(tokens_LE.mean(axis=1, keepdims=True), 1e-9)
    width, height = 8, 4.5
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(0.8 / width, 0.6 / height, 1.0, 1 - 0.8 / height)
    axes = figure.subplots()
    # Blue below an even share, red above, white at 1 whatever the greatest is.
    norm = TwoSlopeNorm(vcenter=1, vmin=0, vmax=max(2, share_LE.max()))
    image = axes.imshow(share_LE, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="tokens over an even share (1 = even, 0 = none)")
    for axis, name in ((axes.xaxis, "expert"), (axes.yaxis, "layer")):
        axis.set_label_text(name)
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("tokens of each expert")
    figure.suptitle(f"{run.title} · steps {row['first_step']} to {row['step']}")
    return _write(path, figure)


def _write(path: Path, figure: Figure) -> Path:
    # The tracker may be uploading the previous drawing: never show it half a file.
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path
