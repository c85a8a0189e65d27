"""The table of results: every task's headline with its interval and baselines, and the joint scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mtbert.evaluation.baselines import Baselines
from mtbert.evaluation.bootstrap import LEVEL, RESAMPLES, Interval, intervals, ordinal_intervals
from mtbert.evaluation.halves import REPORT_HALF, reported
from mtbert.evaluation.metrics import TaskScores, headline_name, mean, overall, score
from mtbert.evaluation.predictions import Predictions
from mtbert.evaluation.table import Cell, table

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task


@dataclass(frozen=True)
class Results:
    """Scores of one run on one split, with what they are to be read against.

    `intervals` has a key for every task and, when sst, para and sts are all there, `overall` and `mean`. `whole` is
    the same of all of dev where scores and intervals are of its report half, else empty.
    """

    tasks: Mapping[str, Task]
    scores: Mapping[str, TaskScores]
    intervals: Mapping[str, Interval]
    baselines: Mapping[str, Baselines]
    train: Mapping[str, TaskScores]
    split: str = "dev"
    whole: Mapping[str, Interval] = field(default_factory=dict)
    ordinal: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    """Mean absolute error and kappa of the tasks whose classes have an order."""

    @property
    def overall(self) -> float | None:
        """`(SST + paraphrase + (STS + 1) / 2) / 3`, or None."""
        return overall(self.scores)

    @property
    def mean(self) -> float | None:
        """`(SST + paraphrase + STS) / 3`, or None."""
        return mean(self.scores)


def results(
    tasks: Mapping[str, Task],
    predictions: Mapping[str, Predictions],
    *,
    baselines: Mapping[str, Baselines] | None = None,
    train: Mapping[str, TaskScores] | None = None,
    split: str = "dev",
    resamples: int = RESAMPLES,
    halved: bool = False,
) -> Results:
    """Score labelled predictions by task and bootstrap their intervals.

    `halved`: the other half of these examples chose the checkpoint, so that scores are those of the report half.
    """
    labelled = {name: entry for name, entry in predictions.items() if entry.labels is not None}
    chosen = {name: tasks[name] for name in labelled}
    whole = intervals(chosen, labelled, resamples=resamples) if halved else {}
    labelled = reported(labelled, halved)
    scores = {
        name: score(tasks[name], entry.labels, entry.outputs)
        for name, entry in labelled.items()
        if entry.labels is not None
    }
    ends = intervals(chosen, labelled, resamples=resamples)
    ordinal = {
        name: ordinal_intervals(tasks[name], entry, resamples=resamples)
        for name, entry in labelled.items()
        if tasks[name].ordered
    }
    shown = REPORT_HALF if halved else split
    return Results(chosen, scores, ends, baselines or {}, train or {}, shown, whole, ordinal)


def result_rows(results: Results) -> tuple[list[str], list[list[Cell]]]:
    """Headers and rows of the table of results, for the terminal and for Markdown."""
    interval = f"{LEVEL:.0%} interval"
    whole = ["all of dev (optimistic)"] if results.whole else []
    headers = ["task", "metric", results.split, interval, *whole, "train", "chance", "majority", "examples"]
    rows: list[list[Cell]] = []
    for name, task in results.tasks.items():
        base, train = results.baselines.get(name), results.train.get(name)
        rows.append(
            [
                task.title,
                headline_name(task),
                results.scores[name].headline,
                interval_text(results.intervals[name]),
                *_whole(results, name),
                train.headline if train else None,
                base.chance if base else None,
                base.majority if base else None,
                results.scores[name].examples,
            ]
        )
    joint = {"overall": results.overall, "mean": results.mean}
    trained = {"overall": overall(results.train), "mean": mean(results.train)}
    for name, value in joint.items():
        if value is not None:
            ends = interval_text(results.intervals[name])
            rows.append([name, "", value, ends, *_whole(results, name), trained[name], None, None, None])
    return headers, rows


def _whole(results: Results, name: str) -> list[Cell]:
    """The cell of all of dev, where there is such a column."""
    return [results.whole[name].value] if results.whole else []


def interval_text(interval: Interval) -> str:
    """The two ends of an interval, three decimals."""
    return f"{interval.low:.3f} to {interval.high:.3f}"


def results_table(results: Results) -> str:
    """The table of results for the terminal."""
    return table(*result_rows(results))


def class_table_rows(scores: TaskScores) -> tuple[list[str], list[list[Cell]]]:
    """Headers and rows of a task's classes: precision, recall, F1, support, how often it was predicted."""
    headers = ["class", "precision", "recall", "F1", "support", "predicted"]
    rows: list[list[Cell]] = [
        [row.name, row.precision, row.recall, row.f1, row.support, row.predicted] for row in scores.classes
    ]
    return headers, rows
