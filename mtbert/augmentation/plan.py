"""Which training rows are rewritten, and how often: until the classes are even, or the table is k times as long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mtbert.augmentation.draws import Draws
from mtbert.data.tables import Table
from mtbert.errors import ConfigError, DataError
from mtbert.evaluation.baselines import SCORE_BINS
from mtbert.tasks.registry import Task

ROW_CHANGE = 2
"""After so many rejected answers for one row, another row of its class is rewritten instead."""


@dataclass(frozen=True)
class Goal:
    """What the new table is for.

    equalise: every class (of scores: every tenth of their range that has rows) gets as many rows as the largest.
    multiply: the table gets `factor` times as many rows, each rewritten factor - 1 times.
    clean: every row is repaired; none is added.
    limit: at most so many rows are made, spread over the classes as without the limit.
    """

    kind: Literal["equalise", "multiply", "clean"]
    factor: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.kind == "multiply" and self.factor < 2:
            raise ConfigError(
                f"--multiply: expected 2 or more (2 makes the table twice as long), found {self.factor}"
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit: expected at least 1, found {self.limit}")


@dataclass(frozen=True)
class Slot:
    """One row to be made: from which training row it is made at each attempt."""

    number: int
    stratum: int
    rows: tuple[int, ...]

    def row(self, attempt: int) -> int:
        """The training row that attempt number `attempt` rewrites."""
        return self.rows[min(attempt // ROW_CHANGE, len(self.rows) - 1)]


def strata(task: Task, labels: np.ndarray) -> np.ndarray:
    """The class of every row, int64 [n]; of scores the tenth of their range, as the histograms have it."""
    if task.score_range is None:
        return np.asarray(labels, dtype=np.int64)
    low, high = task.score_range
    share = (np.asarray(labels, dtype=np.float64) - low) / (high - low)
    return np.clip(np.floor(share * SCORE_BINS + 1e-9), 0, SCORE_BINS - 1).astype(np.int64)


def plan_rows(
    task: Task, table: Table, goal: Goal, usable: Sequence[int], *, attempts: int, seed: int
) -> list[Slot]:
    """The rows to be made, a class after the other taking turns. `usable`: the training rows that may be rewritten.

    Each class walks through its usable rows in random order, so that none is rewritten twice before all have been once.
    Raises ConfigError where nothing is to be done, DataError where a class has no row to rewrite.
    """
    assert table.labels is not None
    if goal.kind == "clean":
        chosen = list(usable)
        if goal.limit is not None:
            chosen = sorted(Draws(seed, task.name, "clean").shuffled(chosen)[: goal.limit])
        groups = strata(task, table.labels)
        return [Slot(number, int(groups[row]), (row,)) for number, row in enumerate(chosen)]
    groups = strata(task, table.labels)
    sizes = np.bincount(groups)
    wanted = {
        int(group): int(sizes.max() - sizes[group])
        if goal.kind == "equalise"
        else int(sizes[group]) * (goal.factor - 1)
        for group in np.flatnonzero(sizes)
    }
    if not any(wanted.values()):
        raise ConfigError(f"--equalise: the classes of {table.path} are even already; possible: --multiply")
    by_group: dict[int, list[int]] = {}
    for row in usable:
        by_group.setdefault(int(groups[row]), []).append(row)
    changes = -(-attempts // ROW_CHANGE)
    planned: list[tuple[float, int, tuple[int, ...]]] = []
    for group, count in wanted.items():
        rows = by_group.get(group, [])
        if count and not rows:
            raise DataError(
                f"{table.path}: no row of class {group} can be rewritten: each has a sentence of dev or test"
            )
        order = [
            Draws(seed, task.name, group, cycle).shuffled(rows)
            for cycle in range(-(-count // max(len(rows), 1)))
        ]
        walk = [row for cycle in order for row in cycle]
        spare = walk[count:] or rows  # stand in for a row that cannot be rewritten
        for place in range(count):
            others = [spare[(place * (changes - 1) + step) % len(spare)] for step in range(changes - 1)]
            planned.append(((place + 0.5) / count, group, (walk[place], *others)))
    planned.sort(key=lambda entry: entry[:2])
    if goal.limit is not None:
        planned = planned[: goal.limit]
    return [Slot(number, group, rows) for number, (_, group, rows) in enumerate(planned)]
