"""Transfer: what a task gains, or loses, by being trained with the others, against a model of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mtbert.errors import ConfigError, DataError
from mtbert.evaluation.bootstrap import LEVEL, RESAMPLES, Difference, paired_differences
from mtbert.evaluation.halves import REPORT_HALF, WHOLE, reported
from mtbert.evaluation.markdown import escape
from mtbert.evaluation.metrics import headline_name
from mtbert.evaluation.run import check_tasks, read_run
from mtbert.evaluation.table import Cell, markdown_table, table

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task


@dataclass(frozen=True)
class Transfer:
    """Multitask minus single-task on the same examples.

    `differences` has a key for every task with a single-task run and, when sst, para and sts all have one, `overall`
    and `mean`. `split` says which examples: dev, or its report half.
    """

    tasks: Mapping[str, Task]
    differences: Mapping[str, Difference]
    split: str

    def rows(self) -> tuple[list[str], list[list[Cell]]]:
        """Headers and rows: one metric a row."""
        headers = [
            f"metric on {self.split}",
            "single-task",
            "multitask",
            "transfer",
            f"{LEVEL:.0%} interval",
            "share",
        ]
        titles = {name: f"{task.title} ({headline_name(task)})" for name, task in self.tasks.items()}
        rows: list[list[Cell]] = [
            [
                titles.get(key, key),
                found.first,
                found.second,
                f"{found.value:+.3f}",
                f"{found.low:+.3f} to {found.high:+.3f}",
                found.share,
            ]
            for key, found in self.differences.items()
        ]
        return headers, rows

    def to_text(self) -> str:
        """The table for the terminal."""
        return table(*self.rows())

    def to_markdown(self) -> str:
        """The table and how to read it."""
        headers, rows = self.rows()
        body = [[escape(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
        return (
            markdown_table([escape(header) for header in headers], body)
            + f"\n\nTransfer is multitask minus single-task on the same examples ({self.split}), with a paired"
            " bootstrap. `share` is like a two-sided p-value: twice the share of resamples in which the difference is"
            " not of the observed sign. One run a side: it says nothing of other seeds."
        )


def transfer(
    multitask: Path,
    singles: Mapping[str, Path],
    tasks: Mapping[str, Task],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Transfer:
    """Compare the run in `multitask` with a single-task run by task.

    On the report half of dev when every run chose its checkpoint on the other half, else on the whole of dev. Raises
    ConfigError for runs that do not fit, DataError for missing predictions or different dev examples.
    """
    if not singles:
        raise ConfigError("transfer needs at least one single-task run, found none")
    joint = read_run(multitask)
    check_tasks(joint, tasks)
    others = {name: read_run(folder) for name, folder in singles.items()}
    for name, run in others.items():
        if name not in joint.tasks:
            raise ConfigError(f"{multitask}: did not train {name}, only {', '.join(joint.tasks)}")
        if run.tasks != [name]:
            trained = ", ".join(run.tasks)
            raise ConfigError(f"{run.folder}: expected a run of {name} alone, found one of {trained}")
    halved = all(run.halved for run in (joint, *others.values()))
    chosen = {name: tasks[name] for name in joint.tasks if name in others}
    first = reported({name: others[name].predictions(task) for name, task in chosen.items()}, halved)
    second = reported({name: joint.predictions(task) for name, task in chosen.items()}, halved)
    try:
        differences = paired_differences(chosen, first, second, resamples=resamples, seed=seed)
    except DataError as error:
        raise DataError(f"{multitask} and the single-task runs: {error}") from error
    return Transfer(chosen, differences, REPORT_HALF if halved else WHOLE)
