"""Predictions from a head's outputs, and the two files they go to: JSON lines and the course's table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtbert.errors import DataError, NonFiniteError
from mtbert.evaluation.files import write_text

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task

# The course's headers, byte for byte: the spaces around the tab and the spelling "Similiary" are its own.
COURSE_HEADERS = {
    "sst": "id \t Predicted_Sentiment \n",
    "para": "id \t Predicted_Is_Paraphrase \n",
    "sts": "id \t Predicted_Similiary \n",
    "cfimdb": "id \t Predicted_Sentiment \n",
}
MULTITASK_COURSE_TASKS = ("sst", "para", "sts")
SINGLE_TASK_COURSE_TASKS = ("sst", "cfimdb")


@dataclass(frozen=True)
class Predictions:
    """What a model said of one table.

    `labels` is int64 [n] for classes, float64 [n] for scores and None for an unlabelled table; `outputs` is
    float64 [n, k]: class logits, one logit (binary), or one score in label units (similarity).
    """

    task: str
    split: str
    ids: tuple[str, ...]
    labels: np.ndarray | None
    outputs: np.ndarray

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.ids)


def check_outputs(task: Task, outputs: np.ndarray) -> np.ndarray:
    """`outputs` as float64 [n, task.outputs].

    Raises ValueError for another shape and NonFiniteError when an output is NaN or infinite.
    """
    array = np.asarray(outputs, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != task.outputs:
        raise ValueError(f"{task.name}: outputs must have the shape [n, {task.outputs}], found {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise NonFiniteError(
            f"{task.name}: the outputs of {len(bad)} of {len(array)} examples are NaN or infinite "
            f"(the first is example {bad[0]}): the model has diverged, or its weights are damaged"
        )
    return array


def predictions_from_outputs(task: Task, outputs: np.ndarray) -> np.ndarray:
    """The predicted classes (int64 [n]) or scores (float32 [n], label units, not clipped) of outputs [n, k].

    A binary logit of exactly 0 (probability 0.5) gives class 0, as rounding half to even does in the course.
    """
    outputs = check_outputs(task, outputs)
    if task.kind == "classification":
        return outputs.argmax(axis=1).astype(np.int64)
    if task.kind == "binary":
        return (outputs[:, 0] > 0).astype(np.int64)
    return outputs[:, 0].astype(np.float32)


def class_logits(task: Task, outputs: np.ndarray) -> np.ndarray:
    """A logit for each class, float64 [n, classes], of a classification or binary task's outputs [n, k]."""
    outputs = check_outputs(task, outputs)
    return np.concatenate([np.zeros_like(outputs), outputs], axis=1) if task.kind == "binary" else outputs


def probabilities(task: Task, outputs: np.ndarray) -> np.ndarray:
    """Class probabilities float64 [n, classes] of a classification or binary task's outputs [n, k]."""
    logits = class_logits(task, outputs)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def write_course_file(path: Path, task: Task, ids: Sequence[str], predictions: np.ndarray) -> Path:
    """Write CS224N's prediction table: its header, then `id , prediction ` lines, each with a trailing space.

    Numbers print as in the course: sentiment classes as integers, paraphrase predictions as `0.0` and `1.0`
    (they are rounded sigmoids there), similarities as 32-bit floats widened to Python's float.
    """
    if task.name not in COURSE_HEADERS:
        known = ", ".join(COURSE_HEADERS)
        raise ValueError(f"the course has no prediction file for task {task.name!r} (it has: {known})")
    if len(ids) != len(predictions):
        raise ValueError(f"{task.name}: {len(ids)} ids for {len(predictions)} predictions")
    values: Sequence[int | float]
    if task.kind == "classification":
        values = [int(value) for value in predictions]
    else:
        values = [float(value) for value in np.asarray(predictions, dtype=np.float32)]
    lines = [f"{name} , {value} \n" for name, value in zip(ids, values, strict=True)]
    return write_text(path, COURSE_HEADERS[task.name] + "".join(lines))


def course_file_names(task: Task, split: str, mode: str | None = None) -> list[str]:
    """The names under which the course expects a task's predictions; empty for a task that it does not have.

    Several tasks: `{sst,para,sts}-{dev,test}-output.csv`. Objective 2 (one sentiment task alone, `mode` is
    `full-model` or `last-linear-layer`): `{mode}-{sst,cfimdb}-{dev,test}-out.csv`.
    """
    names = []
    if task.name in MULTITASK_COURSE_TASKS:
        names.append(f"{task.name}-{split}-output.csv")
    if task.name in SINGLE_TASK_COURSE_TASKS and mode is not None:
        names.append(f"{mode}-{task.name}-{split}-out.csv")
    return names


def write_outputs(path: Path, task: Task, predictions: Predictions) -> Path:
    """Write one JSON object a line: `{"id", "label" (null when unknown), "prediction", "outputs": [...]}`."""
    outputs = check_outputs(task, predictions.outputs)
    predicted = predictions_from_outputs(task, outputs).tolist()
    labels = [None] * len(outputs) if predictions.labels is None else predictions.labels.tolist()
    rows = zip(predictions.ids, labels, predicted, outputs.tolist(), strict=True)
    lines = [
        json.dumps({"id": name, "label": label, "prediction": value, "outputs": row}) + "\n"
        for name, label, value, row in rows
    ]
    return write_text(path, "".join(lines))


def read_outputs(path: Path, task: Task, split: str) -> Predictions:
    """Read what `write_outputs` wrote; a DataError names the file, the line and what is wrong with it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{path}: there are no predictions for {task.name} ({split}) here") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    ids: list[str] = []
    labels: list[int | float | None] = []
    outputs: list[list[float]] = []
    for number, line in enumerate(lines, start=1):
        name, label, row = _parse_line(f"{path}: line {number}", line, task)
        ids.append(name)
        labels.append(label)
        outputs.append(row)
    unlabelled = sum(label is None for label in labels)
    if 0 < unlabelled < len(labels):
        raise DataError(f"{path}: {unlabelled} of {len(labels)} lines have no label; expected all or none")
    label_type = np.float64 if task.kind == "similarity" else np.int64
    label_array = None if unlabelled else np.array(labels, dtype=label_type)
    output_array = np.array(outputs, dtype=np.float64).reshape(len(ids), task.outputs)
    try:
        return Predictions(task.name, split, tuple(ids), label_array, check_outputs(task, output_array))
    except NonFiniteError as error:
        raise NonFiniteError(f"{path}: {error}") from error


def _parse_line(place: str, line: str, task: Task) -> tuple[str, int | float | None, list[float]]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", type(error).__name__)
        raise DataError(f"{place} is not JSON ({reason}); expected one object a line") from error
    if not isinstance(row, dict) or not {"id", "label", "outputs"} <= row.keys():
        raise DataError(f'{place}: expected an object with "id", "label" and "outputs", found {line[:80]!r}')
    outputs, label = row["outputs"], row["label"]
    if not isinstance(outputs, list) or len(outputs) != task.outputs or not all(map(_is_number, outputs)):
        raise DataError(f'{place}: "outputs" must be {task.outputs} number(s), found {str(outputs)[:80]}')
    if label is not None and not _is_number(label):
        raise DataError(f'{place}: "label" must be a number or null, found {label!r:.80}')
    if label is not None and task.kind != "similarity" and label not in range(task.classes):
        raise DataError(f"{place}: label {label!r} is not one of the {task.classes} classes of {task.name}")
    return str(row["id"]), label, outputs


def _is_number(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and not (isinstance(value, int) and abs(value) >= 2**63)
    )


def predictions_path(folder: Path, task: str, split: str) -> Path:
    """Where a run's folder keeps the JSON lines of a task and a split."""
    return folder / "predictions" / f"{task}-{split}.jsonl"


def write_prediction_files(
    folder: Path, task: Task, predictions: Predictions, mode: str | None = None
) -> list[Path]:
    """Write every prediction file of one task and split under `folder`/predictions and return their paths.

    JSON lines always; the course's tables where the course has the task. `mode` (`full-model` or
    `last-linear-layer`) is given by runs that train one sentiment task alone, for the course's objective 2.
    """
    paths = [write_outputs(predictions_path(folder, task.name, predictions.split), task, predictions)]
    predicted = predictions_from_outputs(task, predictions.outputs)
    for name in course_file_names(task, predictions.split, mode):
        paths.append(write_course_file(folder / "predictions" / name, task, predictions.ids, predicted))
    return paths
