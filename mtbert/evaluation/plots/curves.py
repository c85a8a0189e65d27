"""Curves over the steps of one run: losses, scores, learning rate, gradient norm, speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mtbert.evaluation.baselines import Baselines
from mtbert.evaluation.history import History
from mtbert.evaluation.metrics import headline_name, metric_fields, second_name
from mtbert.evaluation.plots.style import (
    BLACK,
    BLUE,
    DEV,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    TRAIN,
    Source,
    empty,
    legend,
    panels,
    smoothed,
    stacked_panels,
    tidy,
)

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task

# What train and dev leave of the palette; a task with more classes gets no line for each.
_CLASS_COLORS = (GREEN, PURPLE, ORANGE, SKY, BLACK)
_SMOOTH_FROM = 60  # points in a curve from which a moving mean is drawn over the raw values


def loss_curves(history: History, tasks: Mapping[str, Task], source: Source, *, dev: str = "dev") -> Figure:
    """Training and dev loss of every task over the steps; `dev` names what the evaluations were on."""
    figure, axes = panels(len(tasks), source)
    for panel, (name, task) in zip(axes, tasks.items(), strict=True):
        tidy(panel, task.title, "step", loss_unit(task))
        trend(panel, *history.losses(name), color=TRAIN, label="train")
        steps, values = history.dev_losses(name)
        if steps:
            panel.plot(steps, values, color=DEV, marker="o", markersize=4, linewidth=1.6, label=dev)
        finish(panel, "no losses recorded")
    return figure


def metric_curves(
    history: History,
    tasks: Mapping[str, Task],
    baselines: Mapping[str, Baselines],
    source: Source,
    *,
    dev: str = "dev",
) -> Figure:
    """Two panels a task, on train and dev: the headline metric with the baseline as a dashed line, and under
    it the second metric: Spearman's correlation, or macro F1 with thin lines for the dev F1 of every class. `dev`
    names what the evaluations were on.
    """
    figure, axes = stacked_panels(len(tasks), source)
    for (panel, below), (name, task) in zip(axes, tasks.items(), strict=True):
        metric, second = metric_fields(task)
        tidy(panel, task.title, "step", headline_name(task))
        _train_and_dev(panel, history, name, metric, dev)
        base = baselines.get(name)
        if base is not None and panel.lines:
            label, value = "majority class", base.majority
            if task.kind == "similarity":
                label, value = "mean score", base.chance
            elif value is None:
                label, value = "random chance", base.chance
            panel.axhline(value, color=GREY, linestyle="--", linewidth=1.2, label=label)
        finish(panel, "no evaluations recorded")
        classes = {} if task.kind == "similarity" else history.class_f1("dev", name)
        detailed = 0 < len(classes) <= len(_CLASS_COLORS)
        title = f"{second_name(task)} (thin: dev F1 by class)" if detailed else second_name(task)
        tidy(below, title, "step", "F1" if detailed else second_name(task))
        _train_and_dev(below, history, name, second, dev)
        if detailed:
            for (label, (steps, values)), color in zip(classes.items(), _CLASS_COLORS, strict=False):
                below.plot(steps, values, color=color, marker=".", markersize=4, linewidth=1.0, label=label)
        finish(below, "no evaluations recorded", outside=detailed)
    return figure


def _train_and_dev(panel: Axes, history: History, task: str, metric: str, dev: str) -> None:
    for split, label, color, marker in (("train", "train", TRAIN, "s"), ("dev", dev, DEV, "o")):
        steps, values = history.scores(split, task, metric)
        if steps:
            panel.plot(
                steps, values, color=color, marker=marker, markersize=4, linewidth=1.6, label=label, zorder=3
            )


def optimiser_curves(history: History, source: Source) -> Figure:
    """Learning rate and gradient norm (before clipping) over the steps."""
    figure, (rate, norm) = panels(2, source)
    tidy(rate, "Learning rate", "step", "learning rate")
    steps, values = history.column("lr")
    if steps:
        rate.plot(steps, values, color=BLUE, linewidth=1.6)
        rate.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")
    finish(rate, "no steps recorded")
    tidy(norm, "Gradient norm", "step", "norm before clipping")
    trend(norm, *history.column("grad_norm"), color=BLUE, label="")
    finish(norm, "no steps recorded")
    return figure


def speed_plot(history: History, source: Source, *, cached: bool = False) -> Figure:
    """Seconds of every epoch and tokens a second: bars as wide as the share of an epoch that they stand for.

    `cached`: the encoder's features came from memory, so that the tokens are those of the examples trained on.
    """
    figure, (seconds, tokens) = panels(2, source)
    times = history.epoch_times()
    ends = [time.epoch for time in times]
    starts = [0.0, *ends][:-1]
    widths = [0.86 * (end - start) for start, end in zip(starts, ends, strict=True)]
    centres = [(start + end) / 2 for start, end in zip(starts, ends, strict=True)]
    tidy(seconds, "Time", "epochs done", "seconds between the ends of epochs")
    unit = "examples' tokens per second\n(features cached)" if cached else "useful tokens per second"
    tidy(tokens, "Throughput", "epochs done", unit)
    columns = (
        (seconds, [time.seconds for time in times], BLUE),
        (tokens, [time.tokens_per_second for time in times], GREEN),
    )
    for panel, values, color in columns:
        if values:
            panel.bar(centres, values, color=color, width=widths)
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        panel.grid(False, axis="x")
        finish(panel, "no whole epoch yet", filled=bool(values))
    return figure


def trend(
    panel: Axes, steps: list[float], values: list[float], *, color: str, label: str, style: str = "-"
) -> None:
    """A curve; with many points the raw values are pale and their moving mean is drawn over them."""
    if len(values) < _SMOOTH_FROM:
        if values:
            marker = "o" if len(values) == 1 else None
            panel.plot(steps, values, color=color, linestyle=style, linewidth=1.6, marker=marker, label=label)
        return
    panel.plot(steps, values, color=color, linewidth=0.7, alpha=0.3)
    mean = smoothed(values, len(values) // 25)
    panel.plot(steps, mean, color=color, linestyle=style, linewidth=1.6, label=label)


def finish(panel: Axes, reason: str, filled: bool | None = None, *, outside: bool = False) -> None:
    """Whole steps on the x axis, and a legend (`outside`: under the panel) or why there is nothing to see."""
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if filled if filled is not None else bool(panel.lines):
        if outside:
            legend(panel, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, borderaxespad=0.0)
        else:
            legend(panel)
    else:
        empty(panel, reason)


def loss_unit(task: Task) -> str:
    """The loss of a kind of task with its unit, for an axis."""
    return {
        "classification": "cross-entropy (nats)",
        "binary": "binary cross-entropy (nats)",
        "similarity": "squared error (scores as 0..1)",
    }[task.kind]
