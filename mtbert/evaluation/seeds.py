"""Mean and deviation of one experiment over several seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtbert.errors import ConfigError, DataError
from mtbert.evaluation.files import write_text
from mtbert.evaluation.markdown import escape
from mtbert.evaluation.metrics import headline_name, mean, overall, score, second_name
from mtbert.evaluation.run import check_tasks, read_run
from mtbert.evaluation.table import Cell, markdown_table, table
from mtbert.tasks.registry import TASKS, Task


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
    """Dev metrics of several runs of one experiment."""

    runs: tuple[str, ...]
    metrics: tuple[Metric, ...]

    def rows(self) -> tuple[list[str], list[list[Cell]]]:
        """Headers and rows: one metric a row, then its mean, deviation and every run's value."""
        rows: list[list[Cell]] = [
            [metric.name, metric.mean, metric.deviation, *metric.values] for metric in self.metrics
        ]
        return ["dev metric", "mean", "deviation", *self.runs], rows

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
        )


def summarise_seeds(folders: Sequence[Path], tasks: Mapping[str, Task] = TASKS) -> SeedsSummary:
    """Score the dev predictions of every run and join them; the runs must have trained the same tasks.

    Raises ConfigError or DataError naming the run that does not fit.
    """
    if not folders:
        raise ConfigError("no runs to summarise")
    names: list[str] = []
    values: dict[str, list[float]] = {}
    trained: list[str] | None = None
    for folder in folders:
        run = read_run(folder)
        check_tasks(run, tasks)
        if trained is not None and run.tasks != trained:
            raise DataError(f"{folder}: trained {run.tasks}, the runs before it {trained}")
        trained = run.tasks
        names.append(run.folder.name)  # the page lies beside these folders
        for metric, value in _metrics(run.tasks, tasks, folder).items():
            values.setdefault(metric, []).append(value)
    return SeedsSummary(tuple(names), tuple(Metric(name, tuple(column)) for name, column in values.items()))


def write_seeds(folder: Path, folders: Sequence[Path], tasks: Mapping[str, Task] = TASKS) -> SeedsSummary:
    """Summarise and write `folder`/seeds.md."""
    summary = summarise_seeds(folders, tasks)
    write_text(folder / "seeds.md", summary.to_markdown())
    return summary


def _metrics(names: Sequence[str], tasks: Mapping[str, Task], folder: Path) -> dict[str, float]:
    run = read_run(folder)
    scores = {}
    for name in names:
        predictions = run.predictions(tasks[name])
        if predictions.labels is None:
            raise DataError(f"{folder}: the dev predictions of {name} have no labels")
        scores[name] = score(tasks[name], predictions.labels, predictions.outputs)
    metrics: dict[str, float] = {}
    for name, result in scores.items():
        metrics[f"{name} {headline_name(tasks[name])}"] = result.headline
        metrics[f"{name} {second_name(tasks[name])}"] = result.second
    for label, value in (("overall", overall(scores)), ("mean", mean(scores))):
        if value is not None:
            metrics[label] = value
    return metrics
