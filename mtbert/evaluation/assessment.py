"""All that is said of one task's predictions on one table: scores, intervals, calibration, swapped pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mtbert.evaluation.baselines import Baselines
from mtbert.evaluation.calibration import CalibrationReport, calibration_report, calibration_rows
from mtbert.evaluation.metrics import TaskScores, class_names
from mtbert.evaluation.predictions import Predictions
from mtbert.evaluation.results import Results, class_table_rows, interval_text, results, results_table
from mtbert.evaluation.swaps import SwapConsistency
from mtbert.evaluation.table import Cell, table

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task


@dataclass(frozen=True)
class Assessment:
    """One task on one table."""

    task: Task
    predictions: Predictions
    results: Results
    calibration: CalibrationReport | None
    """None for a similarity."""
    swaps: SwapConsistency | None
    """None for single sentences."""

    @property
    def scores(self) -> TaskScores:
        """Accuracy, Pearson's correlation and the like."""
        return self.results.scores[self.task.name]

    def to_text(self) -> str:
        """For the terminal."""
        return "\n\n".join([results_table(self.results), *details(self)])

    def to_json(self) -> dict[str, Any]:
        """Scores, and what belongs to them under keys of their own."""
        found: dict[str, Any] = self.scores.to_json()
        name = self.task.name
        found["interval"] = asdict(self.results.intervals[name])
        ordinal = self.results.ordinal.get(name)
        if ordinal:
            found["ordinal_intervals"] = {key: asdict(each) for key, each in ordinal.items()}
        if self.calibration is not None:
            found["calibration"] = self.calibration.to_json()
        if self.swaps is not None:
            found["swapped_pairs"] = self.swaps.to_json()
        return found


def assess(
    task: Task,
    predictions: Predictions,
    *,
    swaps: SwapConsistency | None = None,
    baselines: Baselines | None = None,
    resamples: int,
    halved: bool = False,
) -> Assessment:
    """Everything of labelled predictions. halved: as in `results`."""
    found = results(
        {task.name: task},
        {task.name: predictions},
        baselines={} if baselines is None else {task.name: baselines},
        split=predictions.split,
        resamples=resamples,
        halved=halved,
    )
    return Assessment(task, predictions, found, calibration_report(task, predictions, halved=halved), swaps)


def details(assessment: Assessment) -> list[str]:
    """What stands below the table of results: classes, confusion, order, calibration, swapped pairs."""
    task, scores = assessment.task, assessment.scores
    parts = []
    names = class_names(task)
    if names:
        parts.append(table(*class_table_rows(scores)))
        counts: list[list[Cell]] = [[name, *row] for name, row in zip(names, scores.confusion, strict=True)]
        parts.append(table(["true class, predicted as", *names], counts))
    else:
        parts.append(f"Spearman {scores.spearman:.3f}, mean squared error {scores.mse:.3f}")
    ordinal = ordinal_text(assessment.results, task)
    if ordinal:
        parts.append(ordinal)
    if assessment.calibration is not None:
        parts.append(table(*calibration_rows(assessment.calibration)))
    if assessment.swaps is not None:
        parts.append(assessment.swaps.to_text())
    return parts


def ordinal_text(results: Results, task: Task) -> str:
    """Mean absolute error and kappa with their intervals; empty for a task without an order."""
    ends: Mapping[str, Any] = results.ordinal.get(task.name, {})
    said = [f"{name} {each.value:.3f} ({interval_text(each)})" for name, each in ends.items()]
    return f"The classes have an order: {', '.join(said)}." if said else ""
