"""Predicted against true similarity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from mtbert.evaluation.metrics import TaskScores
from mtbert.evaluation.plots.style import BLACK, BLUE, Source, legend, new_figure, tidy

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task

_HEXAGONS_FROM = 400  # points from which density says more than dots


def similarity_plot(
    task: Task,
    labels: np.ndarray,
    predicted: np.ndarray,
    scores: TaskScores,
    source: Source,
    split: str = "dev",
) -> Figure:
    """Scores in label units [n]: dots, or hexagons coloured by count, with the identity dashed."""
    low, high = task.score_range or (float(labels.min()), float(labels.max()))
    figure = new_figure(5.6, 4.6, source)
    panel = figure.add_subplot()
    figures = f"Pearson {scores.headline:.3f}, Spearman {scores.spearman or 0.0:.3f}"
    title = f"{task.title}, {split}\n{figures}, {scores.examples:,} examples"
    tidy(panel, title, "true score", "predicted score")
    bottom, top = min(low, float(predicted.min())), max(high, float(predicted.max()))
    room = 0.03 * (top - bottom)
    if len(labels) >= _HEXAGONS_FROM:
        extent = (low, high, bottom, top)
        hexagons = panel.hexbin(
            labels,
            predicted,
            gridsize=26,
            extent=extent,
            mincnt=1,
            cmap="viridis_r",
            norm=LogNorm(),
            linewidths=0.2,
        )
        most = int(np.asarray(hexagons.get_array()).max())
        ticks = [digit * 10**power for power in range(6) for digit in (1, 2, 5) if digit * 10**power <= most]
        bar = figure.colorbar(hexagons, ax=panel, ticks=ticks, format="%d")
        bar.minorticks_off()
        bar.set_label("examples", size=8)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
    else:
        panel.scatter(labels, predicted, s=16, color=BLUE, alpha=0.5, linewidths=0)
    panel.plot([low, high], [low, high], color=BLACK, linestyle="--", linewidth=1.4, label="predicted = true")
    panel.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    panel.set_ylim(bottom - room, top + room)
    legend(panel, loc="upper left")
    return figure
