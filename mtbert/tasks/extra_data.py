"""Further training tables (`--extra-data TASK=FILE`): rows that join a task's training table, and no other split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mtbert.data.held_out import HeldOut
from mtbert.data.tables import ExtraRows, RowProblem, Table, read_table
from mtbert.errors import ConfigError, DataError
from mtbert.tasks.registry import Task, get_task


def extra_files(entries: Sequence[str]) -> dict[str, list[Path]]:
    """The files by task of `TASK=FILE` entries. Raises ConfigError for another form and for a file named twice."""
    files: dict[str, list[Path]] = {}
    for entry in entries:
        name, separator, path = entry.partition("=")
        if not separator or not name or not path:
            raise ConfigError(f"extra_data: expected TASK=FILE, such as sst=paraphrases.csv, found {entry!r}")
        get_task(name)
        listed = files.setdefault(name, [])
        if Path(path).resolve() in [known.resolve() for known in listed]:
            raise ConfigError(f"extra_data: {path} is named twice for task {name}")
        listed.append(Path(path))
    return files


def extra_of_tasks(entries: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """The entries that name one of these tasks."""
    return [entry for entry in entries if entry.partition("=")[0] in tasks]


@dataclass(frozen=True)
class ExtraTable:
    """A further table and the sha256 of its file."""

    table: Table
    sha256: str


def read_extra(path: Path, task: Task) -> ExtraTable:
    """Read a further training table of a task. Raises DataError for what is wrong with it."""
    table = read_table(path, task.name, "train", task.layout)
    return ExtraTable(table, hashlib.sha256(path.read_bytes()).hexdigest())


def join(splits: Mapping[str, Table], extras: Sequence[ExtraTable]) -> Table:
    """The training table with the rows of further tables behind its own.

    A row whose sentences also stand in dev or test (case, spaces and punctuation aside; a pair's in any order) is left
    out, as a problem of the joined table. Raises DataError for an id that an earlier row has, and where most rows
    would be left out.
    """
    train, held_out = splits["train"], HeldOut(splits)
    assert train.labels is not None
    ids, texts, labels = list(train.ids), list(train.texts), [train.labels]
    lines, files, problems = list(train.lines), [train.path] * len(train), list(train.problems)
    places = {row_id: number for number, row_id in enumerate(train.ids)}
    described = []
    for extra in extras:
        table = extra.table
        assert table.labels is not None
        kept, leaking = [], []
        for number, (row_id, sentences) in enumerate(zip(table.ids, table.texts, strict=True)):
            if row_id in places:
                _refuse_id(table, number, f"{files[places[row_id]]}, line {lines[places[row_id]]}")
            leak = held_out.row(sentences)
            if leak is not None:
                leaking.append(RowProblem(table.path, table.lines[number], f"the example {leak}"))
                continue
            places[row_id] = len(ids)
            kept.append(number)
            ids.append(row_id)
            texts.append(sentences)
            lines.append(table.lines[number])
            files.append(table.path)
        if len(leaking) > len(kept):
            raise DataError(
                f"{leaking[0]}; so do {len(leaking)} of {len(table)} rows of this table: it must not be trained on"
            )
        problems += [*table.problems, *leaking]
        labels.append(table.labels[kept])
        left_out = len(table.problems) + len(leaking)
        described.append(ExtraRows(table.path, extra.sha256, len(kept), left_out, labels[-1]))
    return replace(
        train,
        ids=ids,
        texts=texts,
        labels=np.concatenate(labels),
        lines=lines,
        problems=problems,
        files=files,
        extra=tuple(described),
    )


def _refuse_id(table: Table, number: int, before: str) -> None:
    raise DataError(
        f"{table.place(number)}: the id {table.ids[number]} stands in {before} already; expected new ids"
        " (a cleaned table takes the place of a training table, it does not join it)"
    )
