"""Forgetting: what every task scores on dev after each phase of a sequential curriculum."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtbert.evaluation.history import History, epoch_text
from mtbert.evaluation.metrics import headline_name, metric_fields
from mtbert.evaluation.table import MISSING, Cell

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task


@dataclass(frozen=True)
class Phase:
    """The end of a task's phase: the headline of every task on dev, and its change since the task's own phase.

    `changes` lacks the task itself and those whose first phase is yet to come.
    """

    task: str
    epoch: float
    step: int
    scores: Mapping[str, float]
    changes: Mapping[str, float]


def phases(history: History, tasks: Mapping[str, Task]) -> list[Phase]:
    """The phases that are over, in their order; a task's own phase is the latest of them."""
    found: list[Phase] = []
    own: dict[str, float] = {}
    for line in history.phases():
        scores = {}
        for name, task in tasks.items():
            value = ((line.get("dev") or {}).get(name) or {}).get(metric_fields(task)[0])
            if value is not None:
                scores[name] = float(value)
        trained = str(line["phase"])
        changes = {name: scores[name] - own[name] for name in scores if name in own and name != trained}
        found.append(Phase(trained, float(line.get("epoch") or 0.0), line["step"], scores, changes))
        if trained in scores:
            own[trained] = scores[trained]
    return found


def backward_transfer(found: Sequence[Phase]) -> float | None:
    """The mean change of the tasks at the end, the one trained last aside; below 0 is forgetting.

    Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory for Continual Learning", equation 3, with the latest phase of
    each task where it has several. None before the second task's phase is over.
    """
    return statistics.fmean(found[-1].changes.values()) if found and found[-1].changes else None


def phase_rows(found: Sequence[Phase], tasks: Mapping[str, Task]) -> tuple[list[str], list[list[Cell]]]:
    """Headers and rows, one row a phase: epochs done, the task trained, and by task `score (change)`."""
    headers = ["epoch", "after", *(f"{name} {headline_name(task)}" for name, task in tasks.items())]
    rows: list[list[Cell]] = []
    for phase in found:
        row: list[Cell] = [epoch_text(phase.epoch), phase.task]
        for name in tasks:
            text = f"{phase.scores[name]:.3f}" if name in phase.scores else MISSING
            if name == phase.task:
                text += " (own)"
            elif name in phase.changes:
                text += f" ({phase.changes[name]:+.3f})"
            row.append(text)
        rows.append(row)
    return headers, rows
