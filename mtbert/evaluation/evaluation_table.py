"""The table of evaluations: how every task's scores went on train and dev while the model was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mtbert.evaluation.history import History, epoch_text
from mtbert.evaluation.metrics import headline_name, metric_fields, second_name
from mtbert.evaluation.table import MISSING, Cell, text_of

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task

_JOINT = ("overall", "mean")


def evaluation_rows(history: History, tasks: Mapping[str, Task]) -> tuple[list[str], list[list[Cell]]]:
    """Headers and rows, one row an evaluation: epoch, step, then by task the headline and the second metric
    as `train / dev` and the dev loss, and the joint scores of dev where they are defined.
    """
    joint = [name for name in _JOINT if any(line.get(name) is not None for line in history.evaluations)]
    headers = ["epoch", "step"]
    for name, task in tasks.items():
        headers += [f"{name} {column}" for column in (headline_name(task), second_name(task), "dev loss")]
    headers += joint
    best = history.best_evaluation()
    rows: list[list[Cell]] = []
    for line in history.evaluations:
        epoch = epoch_text(line["epoch"]) if "epoch" in line else MISSING
        row: list[Cell] = [f"{epoch} (best)" if line is best else epoch, line["step"]]
        for name, task in tasks.items():
            row += [_train_and_dev(line, name, field) for field in metric_fields(task)]
            row.append(_nested(line, "dev_loss", name))
        rows.append(row + [line.get(name) for name in joint])
    return headers, rows


def _train_and_dev(line: Mapping[str, Any], task: str, field: str) -> str:
    return " / ".join(text_of(_nested(line, split, task, field)) for split in ("train", "dev"))


def _nested(line: Mapping[str, Any], *keys: str) -> Any:
    """The value under the keys, None where one is missing: a run may score no training examples."""
    value: Any = line
    for key in keys:
        value = (value or {}).get(key)
    return value
