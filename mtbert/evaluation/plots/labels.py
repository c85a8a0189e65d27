"""How labels are spread over the training and the dev table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from mtbert.evaluation.metrics import class_names
from mtbert.evaluation.plots.style import DEV, TRAIN, Source, empty, legend, panels, tidy

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task

Histograms = Mapping[str, Mapping[str, Mapping[str, Any]]]


def label_histograms(tasks: Mapping[str, Task], histograms: Histograms, source: Source) -> Figure:
    """Shares of the labels by task; `histograms[task][split]` is what `baselines.label_histogram` gave."""
    figure, axes = panels(len(tasks), source)
    for panel, (name, task) in zip(axes, tasks.items(), strict=True):
        tidy(panel, task.title, "score" if task.kind == "similarity" else "class", "share of examples")
        panel.grid(False, axis="x")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        drawn = histograms.get(name, {})
        for split, color, side in (("train", TRAIN, -1), ("dev", DEV, 1)):
            if not drawn.get(split):
                continue
            counts = np.array(drawn[split]["counts"], dtype=float)
            shares = counts / max(counts.sum(), 1.0)
            label = f"{split} ({int(counts.sum()):,})"
            if task.kind == "similarity":
                edges = np.array(drawn[split]["edges"])
                width = edges[1] - edges[0]
                centres = (edges[:-1] + edges[1:]) / 2
                panel.bar(centres + side * width * 0.21, shares, width * 0.42, color=color, label=label)
            else:
                panel.bar(np.arange(len(counts)) + side * 0.2, shares, 0.4, color=color, label=label)
        if task.kind != "similarity":
            names = [text.replace(" ", "\n") for text in class_names(task)]
            panel.set_xticks(range(task.classes), names, size=8)
        if panel.patches:
            panel.set_ylim(0, panel.get_ylim()[1] * 1.18)  # room for the legend
            legend(panel, loc="upper center", ncols=2)
        else:
            empty(panel, "no labels recorded")
    return figure
