"""Figures of the methods beside plain training: objectives, the tasks' gradients and weights, embeddings,
forgetting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtbert.evaluation.forgetting import Phase
from mtbert.evaluation.history import History
from mtbert.evaluation.metrics import headline_name
from mtbert.evaluation.plots.curves import finish, trend
from mtbert.evaluation.plots.style import (
    BLACK,
    BLUE,
    DEV,
    GREY,
    SEQUENCE,
    SKY,
    TRAIN,
    Source,
    panels,
    tidy,
)

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task


def objective_curves(history: History, source: Source) -> Figure:
    """The loss of every objective over the steps, with its weight in it, one panel each."""
    names = history.objectives()
    figure, axes = panels(len(names), source)
    for panel, name in zip(axes, names, strict=True):
        tidy(panel, name, "step", "training loss, weighted")
        trend(panel, *history.objective(name), color=TRAIN, label="")
        finish(panel, "no losses recorded")
    return figure


def gradient_curves(history: History, source: Source) -> Figure:
    """Over the steps: cosines of the tasks' gradients by pair, their norms by task and, where a method altered
    gradients, the share of steps in which it did, by task and the task along whose gradient.
    """
    kinds = [
        ("cosine", "Cosines of the tasks' gradients", "cosine"),
        ("norm", "Norms of the tasks' gradients", "norm (log scale)"),
    ]
    altered = [
        name for name in history.gradient_names("altered") if any(history.gradients("altered", name)[1])
    ]
    if altered:
        kinds.append(("altered", "Gradients altered (whose/along whose)", "share of steps"))
    figure, axes = panels(len(kinds), source, height=4.2)
    for panel, (kind, title, unit) in zip(axes, kinds, strict=True):
        tidy(panel, title, "step", unit)
        _trends(panel, history, kind, altered if kind == "altered" else history.gradient_names(kind))
        finish(panel, "not recorded", outside=True)
        if not panel.lines:
            continue
        if kind == "cosine":
            panel.axhline(0.0, color=BLACK, linewidth=0.8)
        elif kind == "norm":
            panel.set_yscale("log")
        else:
            panel.set_ylim(0.0, 1.05)
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return figure


def _trends(panel: Axes, history: History, kind: str, names: Sequence[str]) -> None:
    """A curve each; a pair has the same colour in both of its orders, dashed in the second."""
    colors: dict[frozenset[str], str] = {}
    for name in names:
        pair = frozenset(name.split("/"))
        style = "--" if pair in colors else "-"
        color = colors.setdefault(pair, SEQUENCE[len(colors) % len(SEQUENCE)])
        steps, values = history.gradients(kind, name)
        if kind == "norm":  # a logarithm has no place for the gradient of a task that is not trained
            kept = [(step, value) for step, value in zip(steps, values, strict=True) if value > 0]
            steps, values = [step for step, _ in kept], [value for _, value in kept]
        trend(panel, steps, values, color=color, label=name, style=style)


def weight_curves(history: History, source: Source) -> Figure:
    """The learned weight of every task's loss over the steps, on a logarithmic scale."""
    figure, (panel,) = panels(1, source, height=4.2)
    tidy(panel, "Learned weights of the tasks' losses", "step", "weight (log scale)")
    for place, task in enumerate(history.weighted_tasks()):
        trend(panel, *history.weights(task), color=SEQUENCE[place % len(SEQUENCE)], label=task)
    finish(panel, "not recorded", outside=True)
    if panel.lines:
        panel.set_yscale("log")
    return figure


def embedding_curves(history: History, source: Source) -> Figure:
    """Alignment and uniformity of the sentence embeddings over the evaluations; lower is better in both."""
    figure, axes = panels(2, source)
    best = history.best_evaluation()
    for panel, measure, unit in zip(
        axes,
        ("alignment", "uniformity"),
        ("mean squared distance of positive pairs", "log mean exp(-2 x squared distance)"),
        strict=True,
    ):
        tidy(panel, f"{measure.capitalize()} (lower is better)", "step", unit)
        steps, values = history.embedding(measure)
        if steps:
            panel.plot(steps, values, color=DEV, marker="o", markersize=4, linewidth=1.6)
            if best is not None:
                panel.axvline(
                    best["step"], color=GREY, linestyle="--", linewidth=1.2, label="best evaluation"
                )
        finish(panel, "not measured")
    return figure


def forgetting_plot(
    found: Sequence[Phase], tasks: Mapping[str, Task], source: Source, *, dev: str = "dev"
) -> Figure:
    """Every task's headline after each phase of a sequential curriculum; its own phases are shaded.

    `dev` names what the evaluations were on.
    """
    figure, axes = panels(len(tasks), source)
    for panel, (name, task) in zip(axes, tasks.items(), strict=True):
        tidy(panel, task.title, "step", headline_name(task))
        scored = [phase for phase in found if name in phase.scores]
        starts = [0, *(phase.step for phase in found)]
        own = [(start, phase.step) for start, phase in zip(starts, found, strict=False) if phase.task == name]
        for place, (start, end) in enumerate(own):
            label = "trained here" if place == 0 else None
            panel.axvspan(start, end, color=SKY, alpha=0.25, linewidth=0, label=label)
        if scored:
            panel.plot(
                [phase.step for phase in scored],
                [phase.scores[name] for phase in scored],
                color=BLUE,
                marker="o",
                markersize=4,
                linewidth=1.6,
                label=dev,
            )
            panel.set_xlim(0, found[-1].step * 1.03)
        finish(panel, "no evaluations recorded")
    return figure
