"""How evenly the routers of a run distribute its tokens, over layers and time.

Shapes: L layers, E experts, T bins of time, R rows of `expert_tokens.jsonl`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from gptoss_dist.tracking.pages.curves import layout_of
from gptoss_dist.tracking.pages.skeleton import figure_html, paragraphs_html
from gptoss_dist.tracking.pages.thinning import bins, means, rounded
from gptoss_dist.tracking.recorded.experts import EXPERT_TOKENS_FILE, read_expert_tokens
from gptoss_dist.tracking.recorded.run import RecordedRun

_MOST_TIMES = 120
"""Columns of a heat map over time."""
_MOST_CELLS = 400_000
"""Numbers in the heat maps of all layers together: some 2 MB of text."""
_LAYER = re.compile(r"moe/load_cv/layer_(\d{1,6})")
# White at an even share, blue below it, red above; the same as in plots/expert_tokens.png.
_SHARES = [[0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1, "#b2182b"]]


def routing_html(run: RecordedRun, message: Callable[[str], None]) -> str:
    """Return heat maps of the load of layers over time, and of the experts of each layer over time.

    Args:
        run: The run.
        message: What is told how many lines are damaged, if any is.
    """
    parts = []
    if (figure := imbalance(run)) is not None:
        parts.append(figure_html(figure, height=300))
    if (figure := experts(run, message)) is not None:
        parts.append(figure_html(figure, height=420))
    if not parts:
        return "<p>Nothing is recorded of the experts' load.</p>"
    about = (
        "Above: how unevenly each layer loads its experts (standard deviation over mean; 0 is even). "
        "Below: the tokens of each expert over an even share of its layer's; 1 is even, 0 an expert without a token."
    )
    return paragraphs_html([about]) + "\n".join(parts)


def imbalance(run: RecordedRun) -> dict[str, Any] | None:
    """Return the heat map of `moe/load_cv` over layers and time, None if it was not recorded."""
    layers = sorted(int(found[1]) for name in run.columns if (found := _LAYER.fullmatch(name)))
    if not layers:
        return None
    values_LN = np.stack([run.columns[f"moe/load_cv/layer_{layer}"] for layer in layers])
    known = np.isfinite(values_LN).all(axis=0)
    values_LN, steps = values_LN[:, known], run.columns.steps[known]
    if not len(steps):
        return None
    first, _ = bins(len(steps), _MOST_TIMES)
    return {
        "data": [
            {
                "type": "heatmap",
                "x": np.append(steps[first] - 0.5, steps[-1] + 0.5),
                "y": layers,
                "z": rounded(means(values_LN, first), 3),
                "zmin": 0,
                "colorscale": "Viridis",
                "colorbar": {"title": {"text": "CV"}},
                "hovertemplate": "layer %{y}, about step %{x:.0f}: %{z}<extra></extra>",
            }
        ],
        "layout": _layout("imbalance of each layer", "layer"),
    }


def experts(run: RecordedRun, message: Callable[[str], None]) -> dict[str, Any] | None:
    """Return the heat map of each layer's experts over time, with a menu of layers; None if it was not recorded."""
    assert run.folder is not None, "the file is in the run's folder"
    if not (run.folder / EXPERT_TOKENS_FILE).is_file():
        return None
    rows = read_expert_tokens(run.folder, message)
    if not rows:
        return None
    shape = np.shape(rows[-1]["tokens"])
    rows = [row for row in rows if np.shape(row["tokens"]) == shape]  # others are of another model
    first, ends = bins(len(rows), max(1, min(_MOST_TIMES, _MOST_CELLS // (shape[0] * shape[1]))))
    sums = [np.sum([row["tokens"] for row in rows[a : b + 1]], axis=0, dtype=np.float64) for a, b in zip(first, ends)]
    tokens_TLE = np.stack(sums)
    share_TLE = tokens_TLE / np.maximum(tokens_TLE.mean(axis=2, keepdims=True), 1e-9)
    edges = [rows[first[0]]["first_step"] - 0.5, *(rows[end]["step"] + 0.5 for end in ends)]
    traces = [
        {
            "type": "heatmap",
            "visible": layer == 0,
            "x": edges,
            "z": np.ascontiguousarray(rounded(share_TLE[:, layer].T, 3)),
            "zmin": 0,
            "zmax": 2,
            "colorscale": _SHARES,
            "colorbar": {"title": {"text": "x even"}},
            "hovertemplate": f"layer {layer}, expert %{{y}}, about step %{{x:.0f}}: %{{z}}<extra></extra>",
        }
        for layer in range(shape[0])
    ]
    layout = _layout("load of each expert over time", "expert")
    layout["updatemenus"] = [
        {
            "buttons": [
                {
                    "label": f"layer {layer}",
                    "method": "restyle",
                    "args": [{"visible": [other == layer for other in range(shape[0])]}],
                }
                for layer in range(shape[0])
            ],
            "x": 1,
            "xanchor": "right",
            "y": 1.02,
            "yanchor": "bottom",
        }
    ]
    return {"data": traces, "layout": layout}


def _layout(title: str, vertical: str) -> dict[str, Any]:
    layout = layout_of(title, "steps", title={"text": vertical, "font": {"size": 12}}, tickformat="d")
    return layout | {"margin": {"l": 60, "r": 16, "t": 50, "b": 42}}
