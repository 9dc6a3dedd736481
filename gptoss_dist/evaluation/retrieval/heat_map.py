"""Accuracy by context length and depth as a picture, a panel for each rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(figure: Figure, title: str, lengths: Sequence[int], accuracy: dict[str, np.ndarray]) -> None:
    """Draw heat maps side by side.

    Args:
        figure: An empty figure.
        title: What stands above all of them.
        lengths: Context lengths in tokens.
        accuracy: For each panel, by its title, shares in [0, 1], float [depths, lengths], depth 0 first.
    """
    figure.set_size_inches(1.6 + len(accuracy) * (1.0 + 0.8 * len(lengths)), 5)
    figure.suptitle(title)
    axes = figure.subplots(1, len(accuracy), squeeze=False, sharey=True)[0]
    image = None
    for panel, (name, values) in zip(axes, accuracy.items()):
        image = panel.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        _label(panel, name, lengths, values)
    axes[0].set_ylabel("depth of the needle")
    if image is not None:
        figure.colorbar(image, ax=list(axes), label="accuracy", shrink=0.9)


def _label(panel: Axes, name: str, lengths: Sequence[int], values: np.ndarray) -> None:
    buckets = len(values)
    panel.set(title=name, xlabel="tokens of context")
    panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=30)
    panel.set_yticks(
        range(buckets), [f"{100 * i / buckets:.0f}-{100 * (i + 1) / buckets:.0f} %" for i in range(buckets)]
    )
    for row, column in np.ndindex(*values.shape):
        panel.text(column, row, f"{100 * values[row, column]:.0f}", ha="center", va="center", fontsize=8)
