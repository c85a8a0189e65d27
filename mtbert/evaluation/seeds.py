"""Mean and deviation of one experiment over several seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtbert.errors import ConfigError, DataError
from mtbert.evaluation.files import write_text
from mtbert.evaluation.halves import REPORT_HALF, WHOLE, reported
from mtbert.evaluation.markdown import escape
from mtbert.evaluation.metrics import headline_name, mean, overall, score, second_name
from mtbert.evaluation.predictions import Predictions
from mtbert.evaluation.run import Run, check_tasks, read_run
from mtbert.evaluation.table import Cell, markdown_table, table
from mtbert.tasks.registry import TASKS, Task

_HALVES = (
    "\nCheckpoints were chosen on one half of dev; the metrics are of the other half, which took no part in that. Those"
    " of all of dev count the examples that chose and are optimistic.\n"
)


@dataclass(frozen=True)
class Metric:
    """One metric over the seeds; `deviation` is the sample standard deviation, None for a single run."""

    name: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the runs."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The standard deviation with n - 1 in its denominator."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class SeedsSummary:
    """Dev metrics of several runs of one experiment.

    `split` says whether they are of all of dev or of its report half; in the second case `whole` has the headlines of
    all of dev.
    """

    runs: tuple[str, ...]
    metrics: tuple[Metric, ...]
    split: str = WHOLE
    whole: tuple[Metric, ...] = ()

    def rows(self) -> tuple[list[str], list[list[Cell]]]:
        """Headers and rows: one metric a row, then its mean, deviation and every run's value."""
        rows: list[list[Cell]] = [
            [metric.name, metric.mean, metric.deviation, *metric.values] for metric in self.metrics
        ]
        rows += [
            [f"{metric.name}, all of dev (optimistic)", metric.mean, metric.deviation, *metric.values]
            for metric in self.whole
        ]
        return [f"metric on {self.split}", "mean", "deviation", *self.runs], rows

    def to_text(self) -> str:
        """The table for the terminal."""
        return table(*self.rows(), digits=4)

    def to_markdown(self) -> str:
        """The page seeds.md."""
        headers, rows = self.rows()
        rows = [[escape(str(row[0])), *row[1:]] for row in rows]
        return (
            f"# {len(self.runs)} seeds\n\n"
            + markdown_table([escape(name) for name in headers], rows, digits=4)
            + "\n\nThe deviation is the sample standard deviation (n - 1) over the runs.\n"
            + (_HALVES if self.whole else "")
        )


def summarise_seeds(folders: Sequence[Path], tasks: Mapping[str, Task] = TASKS) -> SeedsSummary:
    """Score the dev predictions of every run and join them; the runs must have trained the same tasks.

    Raises ConfigError or DataError naming the run that does not fit.
    """
    if not folders:
        raise ConfigError("no runs to summarise")
    names: list[str] = []
    values: dict[str, list[float]] = {}
    whole: dict[str, list[float]] = {}
    first: Run | None = None
    for folder in folders:
        run = read_run(folder)
        check_tasks(run, tasks)
        first = first or run
        if run.tasks != first.tasks:
            raise DataError(f"{folder}: trained {run.tasks}, the runs before it {first.tasks}")
        if run.halved != first.halved:
            raise DataError(f"{folder}: evaluation.selection is not that of the runs before it")
        names.append(run.folder.name)  # the page lies beside these folders
        predictions = _predictions(run, tasks)
        for metric, value in _metrics(reported(predictions, run.halved), tasks).items():
            values.setdefault(metric, []).append(value)
        for metric, value in _metrics(predictions, tasks, second=False).items() if run.halved else ():
            whole.setdefault(metric, []).append(value)
    metrics, of_all = (
        tuple(Metric(name, tuple(column)) for name, column in columns.items()) for columns in (values, whole)
    )
    return SeedsSummary(tuple(names), metrics, REPORT_HALF if whole else WHOLE, of_all)


def write_seeds(folder: Path, folders: Sequence[Path], tasks: Mapping[str, Task] = TASKS) -> SeedsSummary:
    """Summarise and write `folder`/seeds.md."""
    summary = summarise_seeds(folders, tasks)
    write_text(folder / "seeds.md", summary.to_markdown())
    return summary


def _predictions(run: Run, tasks: Mapping[str, Task]) -> dict[str, Predictions]:
    found = {name: run.predictions(tasks[name]) for name in run.tasks}
    for name, entry in found.items():
        if entry.labels is None:
            raise DataError(f"{run.folder}: the dev predictions of {name} have no labels")
    return found


def _metrics(
    predictions: Mapping[str, Predictions], tasks: Mapping[str, Task], *, second: bool = True
) -> dict[str, float]:
    """Every task's headline and, unless told otherwise, its second metric; then the joint scores."""
    scores = {
        name: score(tasks[name], entry.labels, entry.outputs)
        for name, entry in predictions.items()
        if entry.labels is not None
    }
    metrics: dict[str, float] = {}
    for name, result in scores.items():
        metrics[f"{name} {headline_name(tasks[name])}"] = result.headline
        if second:
            metrics[f"{name} {second_name(tasks[name])}"] = result.second
    for label, value in (("overall", overall(scores)), ("mean", mean(scores))):
        if value is not None:
            metrics[label] = value
    return metrics
