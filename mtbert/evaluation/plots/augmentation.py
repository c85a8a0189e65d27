"""How labels are spread over a training table before and after rows were added (Peng, Yuan and Wang 2024, figure 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from mtbert.evaluation.metrics import class_names
from mtbert.evaluation.plots.style import BLUE, ORANGE, Source, legend, panels, tidy

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task


def added_labels(task: Task, before: Mapping[str, Any], added: Mapping[str, Any], source: Source) -> Figure:
    """The label histogram before (left) and after (right); both are what `baselines.label_histogram` gives."""
    own, new = np.array(before["counts"], dtype=int), np.array(added["counts"], dtype=int)
    figure, (left, right) = panels(2, source, width=4.8)
    places, width = np.arange(len(own), dtype=float), 0.8
    if task.kind == "similarity":
        edges = np.array(before["edges"])
        places, width = (edges[:-1] + edges[1:]) / 2, 0.85 * float(edges[1] - edges[0])
    top = 1.22 * int((own + new).max())  # room for the legend and the numbers
    for panel, title, more in ((left, "before", np.zeros_like(new)), (right, "after", new)):
        name = f"{task.title}, {title} ({int((own + more).sum()):,} rows)"
        tidy(panel, name, "score" if task.kind == "similarity" else "class", "training rows")
        panel.grid(False, axis="x")
        panel.bar(places, own, width, color=BLUE, label=f"the table's own ({int(own.sum()):,})")
        if more.any():
            panel.bar(places, more, width, bottom=own, color=ORANGE, label=f"added ({int(more.sum()):,})")
        for place, count in zip(places, own + more, strict=True):
            panel.annotate(
                f"{int(count):,}",
                (place, count),
                ha="center",
                va="bottom",
                size=7,
                xytext=(0, 1),
                textcoords="offset points",
            )
        panel.set_ylim(0, max(top, 1))
        if task.kind != "similarity":
            panel.set_xticks(
                range(task.classes), [text.replace(" ", "\n") for text in class_names(task)], size=8
            )
        legend(panel, loc="upper left", ncols=2)
    return figure
