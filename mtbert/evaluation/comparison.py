"""Several runs side by side: scores, paired differences, configuration differences, overlaid curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtbert.errors import ConfigError, DataError
from mtbert.evaluation.bootstrap import LEVEL, RESAMPLES, Difference, Interval, intervals, paired_differences
from mtbert.evaluation.files import write_text
from mtbert.evaluation.markdown import escape
from mtbert.evaluation.metrics import headline_name
from mtbert.evaluation.plots.compare_plots import difference_plot, loss_overlay, metric_overlay
from mtbert.evaluation.plots.style import Source, save
from mtbert.evaluation.results import interval_text
from mtbert.evaluation.run import Run, check_tasks, read_run
from mtbert.evaluation.table import Cell, markdown_table, table

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task

JOINT = ("overall", "mean")
# Where a run lies and what it is called says nothing of how it was trained.
_IGNORED_KEYS = ("output",)


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other, on dev.

    `names` are distinct; `tasks` are those that all runs trained; `intervals` (one a run) and `differences`
    (runs 1, 2, ... from run 0) have a key for every task and, when defined, `overall` and `mean`; `config`
    holds the dotted configuration keys whose values differ.
    """

    runs: tuple[Run, ...]
    names: tuple[str, ...]
    tasks: Mapping[str, Task]
    intervals: tuple[Mapping[str, Interval], ...]
    differences: tuple[Mapping[str, Difference], ...]
    config: Mapping[str, tuple[Any, ...]]

    @property
    def titles(self) -> dict[str, str]:
        """Row titles by key: the tasks with their metric, then the joint scores."""
        titles = {name: f"{task.title} ({headline_name(task)})" for name, task in self.tasks.items()}
        return titles | {name: name for name in JOINT if name in self.intervals[0]}

    def score_rows(self) -> tuple[list[str], list[list[Cell]]]:
        """Headers and rows: one metric a row, then every run's value and interval."""
        headers = ["dev metric"]
        for name in self.names:
            headers += [name, f"{LEVEL:.0%} interval"]
        rows: list[list[Cell]] = []
        for key, title in self.titles.items():
            row: list[Cell] = [title]
            for ends in self.intervals:
                row += [ends[key].value, interval_text(ends[key])]
            rows.append(row)
        return headers, rows

    def difference_rows(self) -> tuple[list[str], list[list[Cell]]]:
        """Headers and rows: every run after the first against the first, by metric."""
        headers = ["run", "dev metric", "difference", f"{LEVEL:.0%} interval", "share"]
        rows: list[list[Cell]] = []
        for name, entry in zip(self.names[1:], self.differences, strict=True):
            for key, title in self.titles.items():
                found = entry[key]
                ends = f"{found.low:+.3f} to {found.high:+.3f}"
                rows.append([name, title, f"{found.value:+.3f}", ends, found.share])
        return headers, rows

    def config_rows(self) -> tuple[list[str], list[list[Cell]]]:
        """Headers and rows: configuration keys whose values differ, and every run's value."""
        rows: list[list[Cell]] = [[key, *map(_shown, values)] for key, values in self.config.items()]
        return ["configuration", *self.names], rows

    def to_text(self) -> str:
        """The three tables for the terminal."""
        parts = [table(*self.score_rows())]
        if self.differences:
            parts.append(
                f"Differences from {self.names[0]} (paired bootstrap):\n" + table(*self.difference_rows())
            )
        if self.config:
            parts.append(table(*self.config_rows()))
        return "\n\n".join(parts)


def compare_runs(
    folders: Sequence[Path], tasks: Mapping[str, Task], *, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Read the runs and compare all of them with the first.

    Raises ConfigError for a folder that holds no run or for runs without a task in common, DataError for
    missing predictions or different dev examples.
    """
    if len(folders) < 2:
        raise ConfigError(f"a comparison needs at least two runs, found {len(folders)}")
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        check_tasks(run, tasks)
    shared = {name: tasks[name] for name in runs[0].tasks if all(name in run.tasks for run in runs)}
    if not shared:
        trained = "; ".join(f"{run.folder}: {', '.join(run.tasks) or 'none'}" for run in runs)
        raise ConfigError(f"the runs have no task in common ({trained})")
    predictions = []
    for run in runs:
        missing = [name for name in shared if not run.has_predictions(name)]
        if missing:
            raise DataError(
                f"{run.folder}: has no dev predictions of {', '.join(missing)}: the run is not finished "
                f"(python -m mtbert.predict {run.folder} writes them)"
            )
        predictions.append({name: run.predictions(task) for name, task in shared.items()})
    differences = []
    for run, entry in zip(runs[1:], predictions[1:], strict=True):
        try:
            found = paired_differences(shared, predictions[0], entry, resamples=resamples, seed=seed)
        except DataError as error:
            raise DataError(f"{runs[0].folder} and {run.folder}: {error}") from error
        differences.append(found)
    return Comparison(
        runs=tuple(runs),
        names=_distinct_names(runs),
        tasks=shared,
        intervals=tuple(intervals(shared, entry, resamples=resamples, seed=seed) for entry in predictions),
        differences=tuple(differences),
        config=config_differences([run.config() for run in runs]),
    )


def write_comparison(comparison: Comparison, output: Path) -> Path:
    """Write compare.md and its figures into `output` and return the page's path."""
    runs, names = comparison.runs, comparison.names
    commits = sorted({run.git for run in runs})
    source = Source(", ".join(names), ", ".join(commits))
    save(
        difference_plot(comparison.differences, names, comparison.titles, source), output / "differences.png"
    )
    save(metric_overlay(runs, names, comparison.tasks, source), output / "metrics.png")
    save(loss_overlay(runs, names, comparison.tasks, source), output / "losses.png")
    listed = [
        f"- {escape(name)}: {escape(str(run.folder))}, {escape(run.git)}"
        for name, run in zip(names, runs, strict=True)
    ]
    parts = [
        "# Comparison of runs\n\n" + "\n".join(listed),
        "## Scores\n\n" + _markdown(*comparison.score_rows()),
        f"## Differences from {escape(names[0])}\n\n"
        + _markdown(*comparison.difference_rows())
        + "\n\nPaired bootstrap on the same dev examples. `share` is like a two-sided p-value: twice the "
        "share of resamples in which the difference is not of the observed sign. It speaks of the choice of "
        "dev examples, not of other seeds.",
        "![differences](differences.png)",
        "## Curves\n\n![metrics](metrics.png)\n\n![losses](losses.png)",
    ]
    settings = "No configuration key differs."
    if comparison.config:
        settings = _markdown(*comparison.config_rows())
    parts.append("## Configuration\n\n" + settings)
    return write_text(output / "compare.md", "\n\n".join(parts) + "\n")


def config_differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """Dotted keys whose values are not the same in all configurations; None where a key is missing."""
    flat = [_flattened(config) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config)
    found = {key: tuple(config.get(key) for config in flat) for key in keys if key not in _IGNORED_KEYS}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def _flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _distinct_names(runs: Sequence[Run]) -> tuple[str, ...]:
    """The runs' names; paths where two runs share a name, numbered where even these are the same."""
    names = [run.name for run in runs]
    names = [
        str(run.folder) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)
    ]
    return tuple(
        f"{name} ({place + 1})" if names.count(name) > 1 else name for place, name in enumerate(names)
    )


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


def _markdown(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    safe = [[escape(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    return markdown_table([escape(header) for header in headers], safe)
