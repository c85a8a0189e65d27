"""Confusion matrices: counts, and shares of each true class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from mtbert.evaluation.metrics import TaskScores, class_names
from mtbert.evaluation.plots.style import Source, new_figure, tidy

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task


def confusion_plot(task: Task, scores: TaskScores, source: Source, split: str = "dev") -> Figure:
    """One cell a pair of true (row) and predicted (column) class: the count, and its share of the row."""
    counts = np.array(scores.confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    classes = len(counts)
    figure = new_figure(max(1.0 * classes + 2.6, 4.8), max(0.72 * classes + 1.6, 3.2), source)
    panel = figure.add_subplot()
    tidy(
        panel,
        f"{task.title}, {split}\naccuracy {scores.headline:.3f}, {scores.examples:,} examples",
        "predicted",
        "true",
    )
    panel.grid(False)
    panel.spines[:].set_visible(False)
    image = panel.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    names = [name.replace(" ", "\n") for name in class_names(task)]
    slanted = any(len(word) > 13 for name in names for word in name.split("\n"))
    panel.set_xticks(range(classes), names, size=8)
    if slanted:
        for label in panel.get_xticklabels():
            label.set(rotation=25, ha="right")
    panel.set_yticks(range(classes), names, size=8)
    panel.tick_params(length=0)
    for row in range(classes):
        for column in range(classes):
            share = shares[row, column]
            panel.text(
                column,
                row,
                f"{counts[row, column]:,}\n{share:.0%}",
                ha="center",
                va="center",
                size=9 if classes <= 6 else 7,
                color="white" if share > 0.55 else "black",
            )
    bar = figure.colorbar(image, ax=panel, shrink=0.9)
    bar.set_label("share of the true class", size=8)
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bar.outline.set_visible(False)
    return figure
