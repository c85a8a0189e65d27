"""SST-5, QQP and STS-B from the Hugging Face hub, through the optional library `datasets`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtbert.data.tables import LABELLED_SPLITS, RowProblem, Table, TableLayout
from mtbert.errors import DataError

UNLABELLED = -1
"""GLUE writes this label where the true one is withheld."""


@dataclass(frozen=True)
class HubSource:
    """Where a task's tables are on the hub: the dataset, its configuration, and the names of its columns."""

    dataset: str
    configuration: str | None
    text_columns: tuple[str, ...]
    label_column: str = "label"
    id_column: str | None = None


HUB_SOURCES: dict[str, HubSource] = {
    "sst": HubSource("SetFit/sst5", None, ("text",)),
    "para": HubSource("nyu-mll/glue", "qqp", ("question1", "question2"), id_column="idx"),
    "sts": HubSource("nyu-mll/glue", "stsb", ("sentence1", "sentence2"), id_column="idx"),
}
"""Task name to source; a new task is added here to be read from the hub too."""

SPLITS = {"train": "train", "validation": "dev", "test": "test"}


def read_hub(
    task: str,
    layout: TableLayout,
    folder: Path | str | None = None,
    loader: Callable[..., Mapping[str, Iterable[Mapping[str, Any]]]] | None = None,
) -> dict[str, Table]:
    """The tables of a task from the hub: splits "train", "dev" (the hub's validation) and "test".

    `folder` reads from copies on disk instead, which lie in it under the names that the datasets have on the
    hub (`FOLDER/SetFit/sst5`, `FOLDER/nyu-mll/glue`), as `hf download --repo-type dataset` makes them; a
    copy without the hub's README.md has one folder per configuration (`FOLDER/nyu-mll/glue/qqp`).
    `loader` stands in for `datasets.load_dataset`.

    A `path` of the tables is "hub:DATASET/CONFIGURATION/SPLIT", and `lines` count the rows of a split from 1.
    A test split in which every label is -1 is unlabelled.
    Raises DataError when the task has no source, the library is missing, or the dataset cannot be read.
    """
    source = HUB_SOURCES.get(task)
    if source is None:
        known = ", ".join(HUB_SOURCES)
        raise DataError(
            f"task {task} is not on the hub; expected one of {known}, or a folder with its tables"
        )
    splits = _load(source, Path(folder) if folder is not None else None, loader or _load_dataset())
    name = "/".join(filter(None, ["hub:" + source.dataset, source.configuration]))
    missing = [split for split in ("train", "validation") if split not in splits]
    if missing:
        raise DataError(
            f"{name}: no split {' and no split '.join(missing)}; found {', '.join(splits) or 'none'}"
        )
    return {
        split: _table(Path(name) / hub_split, task, split, source, layout, splits[hub_split])
        for hub_split, split in SPLITS.items()
        if hub_split in splits
    }


def _load_dataset() -> Callable[..., Any]:
    try:
        return importlib.import_module("datasets").load_dataset
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise DataError(f"the library `datasets` cannot be imported: {error}") from error
        raise DataError(
            "reading from the hub needs the library `datasets`, which is not installed; "
            "pip install datasets, or give a folder with the tables"
        ) from None


def _load(source: HubSource, folder: Path | None, loader: Callable[..., Any]) -> Any:
    place = source.dataset
    arguments = [] if source.configuration is None else [source.configuration]
    if folder is not None:
        local = folder / source.dataset
        if source.configuration is not None and not (local / "README.md").is_file():
            local, arguments = local / source.configuration, []
        if not local.is_dir():
            raise DataError(f"{local}: no such folder; expected a copy of the hub's dataset {source.dataset}")
        place = str(local)
    try:
        return loader(place, *arguments)
    except Exception as error:  # whatever the library, its downloads and its file formats raise
        advice = (
            "is this a complete copy of the dataset?"
            if folder is not None
            else "check the connection, or give a folder with the tables"
        )
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise DataError(
            f"hub dataset {place} cannot be read: {type(error).__name__}: {reason[:300]}; {advice}"
        ) from error


def _table(
    path: Path,
    task: str,
    split: str,
    source: HubSource,
    layout: TableLayout,
    rows: Iterable[Mapping[str, Any]],
) -> Table:
    table = Table(task, split, path, [], [], None, [])
    labels: list[float] = []
    withheld = 0
    for line, row in enumerate(rows, start=1):
        needed = [*source.text_columns, source.label_column, *filter(None, [source.id_column])]
        missing = [name for name in needed if name not in row]
        if missing:
            raise DataError(f"{path}: no column {' and no column '.join(missing)}; found {', '.join(row)}")
        texts = tuple(str(row[name] or "").strip() for name in source.text_columns)
        reasons = [f"no {name}" for name, text in zip(source.text_columns, texts, strict=True) if not text]
        try:
            label = math.nan if row[source.label_column] is None else float(row[source.label_column])
        except ValueError:
            label = math.inf
        if math.isnan(label):
            reasons.append(f"no {source.label_column}")
        elif label == UNLABELLED and split not in LABELLED_SPLITS:
            withheld += 1
        elif not math.isfinite(label) or not layout.labels.allows(label):
            found = row[source.label_column]
            raise DataError(
                f"{path}, row {line}: {source.label_column} is {found!r}, expected {layout.labels}"
            )
        if reasons:
            table.problems.append(RowProblem(path, line, ", ".join(reasons)))
            continue
        table.ids.append(f"{split}-{line - 1 if source.id_column is None else row[source.id_column]}")
        table.texts.append(texts)
        table.lines.append(line)
        labels.append(label)
    if len(table.problems) > len(table.ids) or not table.ids:
        raise DataError(f"{path}: {len(table.problems)} rows cannot be used, {len(table.ids)} can")
    if 0 < withheld < len(labels):
        raise DataError(
            f"{path}: {withheld} of {len(labels)} labels are withheld ({UNLABELLED}); expected all or none"
        )
    array = None if withheld else np.asarray(labels, dtype=layout.labels.dtype)
    return Table(task, split, path, table.ids, table.texts, array, table.lines, table.problems)
