"""Reliability diagrams: how often a model is right, against how sure it says it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from mtbert.evaluation.calibration import Calibration, CalibrationReport, ConfidenceBin
from mtbert.evaluation.plots.style import BLUE, GREY, VERMILION, Source, legend, stacked_panels, tidy

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task


def reliability_plot(task: Task, report: CalibrationReport, source: Source, split: str = "dev") -> Figure:
    """Accuracy by confidence, as it is and with the fitted temperature; below, how many examples a bin has."""
    figure, ((above, below),) = stacked_panels(1, source, width=5.6, heights=(3.7, 1.7))
    whole, tempered = report.whole, report.tempered
    tidy(
        above,
        f"{task.title}, {split}\ncalibration error {whole.ece:.3f}, {whole.examples:,} examples",
        "",
        "accuracy",
    )
    lowest = 1 / task.classes
    above.plot([lowest, 1], [lowest, 1], color=GREY, linewidth=1, linestyle="--", label="as sure as right")
    filled = [each for each in whole.bins if each.examples]
    above.bar(
        [each.low for each in filled],
        [each.accuracy for each in filled],
        width=_widths(filled),
        align="edge",
        color=BLUE,
        alpha=0.3,
        edgecolor="white",
        label="accuracy",
    )
    above.plot(
        *_points(whole), color=BLUE, marker="o", markersize=4, linewidth=1.2, label="at its mean confidence"
    )
    if tempered is not None:
        before, after = tempered.before.ece, tempered.after.ece
        name = f"temperature {tempered.temperature:.2f}: {before:.3f} to {after:.3f}, held out"
        above.plot(
            *_points(tempered.after), color=VERMILION, marker="s", markersize=3.5, linewidth=1.2, label=name
        )
    above.set_ylim(0, 1.02)
    legend(above, loc="lower right")
    tidy(below, "", "confidence: the probability of the predicted class", "examples")
    below.bar(
        [each.low for each in filled],
        [each.examples for each in filled],
        width=_widths(filled),
        align="edge",
        color=BLUE,
        alpha=0.6,
        edgecolor="white",
    )
    for panel in (above, below):
        panel.set_xlim(min([lowest, *(each.low for each in filled)]), 1)
    return figure


def _widths(bins: Sequence[ConfidenceBin]) -> list[float]:
    return [each.high - each.low for each in bins]


def _points(found: Calibration) -> tuple[list[float], list[float]]:
    filled = [each for each in found.bins if each.examples]
    return [each.confidence for each in filled], [each.accuracy for each in filled]
