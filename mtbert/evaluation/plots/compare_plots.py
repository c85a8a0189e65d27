"""Several runs in one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mtbert.evaluation.bootstrap import Difference
from mtbert.evaluation.metrics import headline_name, metric_fields
from mtbert.evaluation.plots.curves import loss_unit, trend
from mtbert.evaluation.plots.style import (
    BLACK,
    GREY,
    MARKERS,
    SEQUENCE,
    Source,
    empty,
    new_figure,
    panels,
    tidy,
)
from mtbert.evaluation.run import Run

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task


def loss_overlay(
    runs: Sequence[Run], names: Sequence[str], tasks: Mapping[str, Task], source: Source
) -> Figure:
    """Training loss (line) and dev loss (dashed, markers) of every run, one panel a task."""
    figure, axes = panels(len(tasks), source)
    for panel, (task_name, task) in zip(axes, tasks.items(), strict=True):
        tidy(panel, task.title, "step", loss_unit(task))
        for place, run in enumerate(runs):
            color, marker = _look(place)
            trend(panel, *run.history.losses(task_name), color=color, label="")
            steps, values = run.history.dev_losses(task_name)
            panel.plot(steps, values, color=color, marker=marker, markersize=4, linewidth=1.4, linestyle="--")
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if not any(run.history.losses(task_name)[0] or run.history.dev_losses(task_name)[0] for run in runs):
            empty(panel, "no losses recorded")
    _runs_legend(figure, names, "line: train, dashed: dev")
    return figure


def metric_overlay(
    runs: Sequence[Run], names: Sequence[str], tasks: Mapping[str, Task], source: Source
) -> Figure:
    """The dev headline of every run over its steps, one panel a task."""
    figure, axes = panels(len(tasks), source)
    for panel, (task_name, task) in zip(axes, tasks.items(), strict=True):
        tidy(panel, task.title, "step", f"dev {headline_name(task)}")
        metric, _ = metric_fields(task)
        for place, run in enumerate(runs):
            color, marker = _look(place)
            steps, values = run.history.scores("dev", task_name, metric)
            panel.plot(steps, values, color=color, marker=marker, markersize=4, linewidth=1.6)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if not any(run.history.scores("dev", task_name, metric)[0] for run in runs):
            empty(panel, "no evaluations recorded")
    _runs_legend(figure, names, "")
    return figure


def difference_plot(
    differences: Sequence[Mapping[str, Difference]],
    names: Sequence[str],
    titles: Mapping[str, str],
    source: Source,
    split: str = "dev",
) -> Figure:
    """Every run's paired difference from the first (`names[0]`) with its interval, one row a metric.

    `differences[i]` belongs to `names[i + 1]`; `titles` gives the rows in their order, `split` names the
    examples.
    """
    rows = [key for key in titles if any(key in entry for entry in differences)]
    figure = new_figure(7.2, 1.1 + len(rows) * (0.28 + 0.2 * len(differences)), source)
    panel = figure.add_subplot()
    tidy(panel, f"Differences on {split}", f"difference from {names[0]} (95% interval)", "")
    panel.xaxis.label.set_parse_math(False)
    spread = 0.7 / max(len(differences), 1)
    for place, entry in enumerate(differences):
        color, marker = _look(place + 1)
        for row, key in enumerate(rows):
            if key not in entry:
                continue
            difference = entry[key]
            height = row + (place - (len(differences) - 1) / 2) * spread
            panel.plot([difference.low, difference.high], [height, height], color=color, linewidth=2)
            panel.plot([difference.value], [height], color=color, marker=marker, markersize=6)
    panel.axvline(0.0, color=BLACK, linewidth=0.8)
    panel.set_yticks(range(len(rows)), [titles[key] for key in rows], size=9)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.grid(False, axis="y")
    _runs_legend(figure, names, "", first=1)
    return figure


def _look(place: int) -> tuple[str, str]:
    return SEQUENCE[place % len(SEQUENCE)], MARKERS[place % len(MARKERS)]


def _runs_legend(figure: Figure, names: Sequence[str], note: str, first: int = 0) -> None:
    """One legend for the whole figure, above its panels: a run's colour and marker."""
    handles = []
    for place in range(first, len(names)):
        color, marker = _look(place)
        name = names[place] if len(names[place]) <= 40 else names[place][:39] + "…"
        handles.append(Line2D([], [], color=color, marker=marker, markersize=5, linewidth=1.6, label=name))
    if note:
        handles.append(Line2D([], [], linestyle="none", label=f"({note})"))
    legend = figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=max(1, min(len(handles), int(figure.get_figwidth() // 2.7))),
        fontsize=8,
        frameon=False,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
        text.set_color(GREY if text.get_text() == f"({note})" else BLACK)
