"""Several runs side by side: scores, paired differences, configuration differences, overlaid curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtbert.errors import ConfigError, DataError
from mtbert.evaluation.bootstrap import LEVEL, RESAMPLES, Difference, Interval, intervals, paired_differences
from mtbert.evaluation.files import write_text
from mtbert.evaluation.halves import REPORT_HALF, WHOLE, reported
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
    """Runs beside each other, on dev, or on its report half (`split`) where all of them chose on the other.

    `names` are distinct; `tasks` are those that all runs trained; `intervals` (one a run) and `differences`
    (runs 1, 2, ... from run 0) have a key for every task and, when defined, `overall` and `mean`; `config`
    holds the dotted configuration keys whose values differ. `whole` holds the differences on all of dev where the
    others are of the report half, else it is empty.
    """

    runs: tuple[Run, ...]
    names: tuple[str, ...]
    tasks: Mapping[str, Task]
    intervals: tuple[Mapping[str, Interval], ...]
    differences: tuple[Mapping[str, Difference], ...]
    config: Mapping[str, tuple[Any, ...]]
    split: str = WHOLE
    whole: tuple[Mapping[str, Difference], ...] = ()

    @property
    def titles(self) -> dict[str, str]:
        """Row titles by key: the tasks with their metric, then the joint scores."""
        titles = {name: f"{task.title} ({headline_name(task)})" for name, task in self.tasks.items()}
        return titles | {name: name for name in JOINT if name in self.intervals[0]}

    def score_rows(self) -> tuple[list[str], list[list[Cell]]]:
        """Headers and rows: one metric a row, then every run's value and interval."""
        headers = [f"metric on {self.split}"]
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
        headers = ["run", f"metric on {self.split}", "difference", f"{LEVEL:.0%} interval", "share"]
        if self.whole:
            headers.append("on all of dev (optimistic)")
        rows: list[list[Cell]] = []
        for place, (name, entry) in enumerate(zip(self.names[1:], self.differences, strict=True)):
            for key, title in self.titles.items():
                found = entry[key]
                row: list[Cell] = [name, title, f"{found.value:+.3f}", _ends(found), found.share]
                if self.whole:
                    other = self.whole[place][key]
                    row.append(f"{other.value:+.3f} ({_ends(other)})")
                rows.append(row)
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
    halved = all(run.halved for run in runs)
    whole: list[Mapping[str, Difference]] = []
    for run, entry in zip(runs[1:], predictions[1:], strict=True):
        try:
            found = paired_differences(shared, predictions[0], entry, resamples=resamples, seed=seed)
        except DataError as error:
            raise DataError(f"{runs[0].folder} and {run.folder}: {error}") from error
        whole.append(found)
    differences = whole
    if halved:
        predictions = [reported(entry, halved) for entry in predictions]
        differences = [
            paired_differences(shared, predictions[0], entry, resamples=resamples, seed=seed)
            for entry in predictions[1:]
        ]
    return Comparison(
        runs=tuple(runs),
        names=_distinct_names(runs),
        tasks=shared,
        intervals=tuple(intervals(shared, entry, resamples=resamples, seed=seed) for entry in predictions),
        differences=tuple(differences),
        config=config_differences([run.config() for run in runs]),
        split=REPORT_HALF if halved else WHOLE,
        whole=tuple(whole) if halved else (),
    )


def write_comparison(comparison: Comparison, output: Path) -> Path:
    """Write compare.md and its figures into `output` and return the page's path."""
    runs, names = comparison.runs, comparison.names
    commits = sorted({run.git for run in runs})
    source = Source(", ".join(names), ", ".join(commits))
    figure = difference_plot(comparison.differences, names, comparison.titles, source, comparison.split)
    save(figure, output / "differences.png")
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
        + f"\n\nPaired bootstrap on the same examples ({comparison.split}). `share` is like a two-sided "
        "p-value: twice the share of resamples in which the difference is not of the observed sign. It speaks "
        f"of the choice of dev examples, not of other seeds.{_selection_note(runs)}",
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


def _ends(difference: Difference) -> str:
    return f"{difference.low:+.3f} to {difference.high:+.3f}"


def _selection_note(runs: Sequence[Run]) -> str:
    """What chose the checkpoints, where that was not the whole of dev in every run."""
    if not any(run.halved for run in runs):
        return ""
    curves = "The dev curves of such a run are of the half that chose."
    if all(run.halved for run in runs):
        return (
            " Checkpoints were chosen on the other half of dev; figures of all of dev count the examples that chose and"
            f" are optimistic. {curves}"
        )
    return f" Some of the runs chose their checkpoint on all of dev, others on one half of it. {curves}"


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
