"""Where the tables come from: the built-in sample, the hub, or a folder in the CS224N layout."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from mtbert.data.hub import read_hub
from mtbert.data.sample import synthetic_tables
from mtbert.data.tables import LABELLED_SPLITS, Table, read_folder
from mtbert.errors import DataError
from mtbert.tasks.extra_data import extra_files, join, read_extra
from mtbert.tasks.registry import Task

SAMPLE = "sample"
HUB = "hub"


def load_tables(
    source: str,
    tasks: Sequence[Task],
    required: Collection[str] = ("train", "dev"),
    extra: Sequence[str] = (),
) -> dict[str, dict[str, Table]]:
    """Tables by task and split.

    `source` is `sample` (synthetic sentences that the project generates), `hub` (SST-5, QQP and STS-B
    through `datasets`; `hub:DIR` reads copies of those data sets under DIR) or a folder. Every task needs
    the `required` splits; those of them that are train or dev need labels. `extra`: further tables, as
    TASK=FILE, whose rows join the training tables (`mtbert.tasks.extra_data`).
    """
    tables: dict[str, dict[str, Table]] = {}
    joining = extra_files(extra)
    for task in tasks:
        if source == SAMPLE:
            splits = synthetic_tables(task.name)
        elif source == HUB or source.startswith(f"{HUB}:"):
            copies = source.partition(":")[2]
            splits = read_hub(task.name, task.layout, Path(copies) if copies else None)
        else:
            splits = read_folder(Path(source), task.name, task.layout, task.files, required)
        for split in required:
            if split not in splits:
                raise DataError(
                    f"{source}: task {task.name} has no {split} table (--tasks chooses the tasks)"
                )
            if split in LABELLED_SPLITS and splits[split].labels is None:
                raise DataError(f"{splits[split].path}: the {split} table of task {task.name} has no labels")
        if task.name in joining:
            splits["train"] = join(splits, [read_extra(path, task) for path in joining[task.name]])
        tables[task.name] = splits
    return tables
