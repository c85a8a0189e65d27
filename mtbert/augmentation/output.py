"""The new table: rows in the task's layout, each with its source."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from mtbert.augmentation.generate import Outcome
from mtbert.data.tables import Table
from mtbert.tasks.registry import Task

SOURCE = "source"
"""The column's name. It holds the id of the training row that a row was made from."""
ORIGINAL = "original"
"""The source of a row that stands as it was (in a table of repairs)."""


def new_rows(task: Task, train: Table, outcome: Outcome) -> tuple[Table, list[str]]:
    """A table of the new rows alone, with ids of their own, and the id of the training row behind each."""
    assert train.labels is not None
    taken = set(train.ids)
    ids, sources = [], []
    for made in outcome.rows:
        source = train.ids[made.row]
        digest = hashlib.sha256("\n".join(made.texts).encode()).hexdigest()
        length = 8
        while (row_id := f"{source}-{digest[:length]}") in taken:
            length += 1
        taken.add(row_id)
        ids.append(row_id)
        sources.append(source)
    rows = [made.row for made in outcome.rows]
    table = Table(
        task=task.name,
        split="train",
        path=Path("new rows"),
        ids=ids,
        texts=[made.texts for made in outcome.rows],
        labels=train.labels[np.array(rows, dtype=np.int64)],
        lines=list(range(2, len(rows) + 2)),
    )
    return table, sources


def repaired_rows(train: Table, outcome: Outcome) -> tuple[Table, list[str], int]:
    """The training table with repaired texts; the source of each row; how many rows a repair changed."""
    texts, sources = list(train.texts), [ORIGINAL] * len(train)
    for made in outcome.rows:
        if made.texts != train.texts[made.row]:
            texts[made.row] = made.texts
            sources[made.row] = train.ids[made.row]
    changed = sum(source != ORIGINAL for source in sources)
    return replace(train, texts=texts), sources, changed
