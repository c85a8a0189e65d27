"""Scores of one task, and the figures that join several tasks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import rankdata

from mtbert.errors import DataError
from mtbert.evaluation.ordinal import mean_absolute_error, moments, quadratic_kappa
from mtbert.evaluation.predictions import check_outputs, predictions_from_outputs

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task

COURSE_TRIO = ("sst", "para", "sts")


class ConstantScoresWarning(RuntimeWarning):
    """A correlation is undefined because predictions or labels do not vary; 0 is reported."""


@dataclass(frozen=True)
class ClassScores:
    """One class: precision, recall and F1 (0 where undefined), its examples, how often it was predicted."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    predicted: int


@dataclass(frozen=True)
class TaskScores:
    """The scores of one task on one table.

    Classification and binary tasks fill `accuracy`, `macro_f1`, `classes` and `confusion` (rows are true
    classes, columns predicted ones); similarity tasks fill `pearson`, `spearman` and `mse` (label units
    squared).
    """

    kind: str
    examples: int
    accuracy: float | None = None
    macro_f1: float | None = None
    classes: tuple[ClassScores, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    pearson: float | None = None
    spearman: float | None = None
    mse: float | None = None
    mean_absolute_error: float | None = None
    """In classes; for a task whose classes have an order, as is the next."""
    quadratic_kappa: float | None = None

    @property
    def headline(self) -> float:
        """Accuracy, or Pearson's correlation for similarity."""
        value = self.pearson if self.kind == "similarity" else self.accuracy
        return 0.0 if value is None else value

    @property
    def second(self) -> float:
        """Macro F1, or Spearman's correlation for similarity: the metric shown beside the headline."""
        value = self.spearman if self.kind == "similarity" else self.macro_f1
        return 0.0 if value is None else value

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary of the fields that this kind of task fills."""
        return {key: value for key, value in asdict(self).items() if value is not None and value != ()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TaskScores:
        """What `to_json` gave. Raises DataError for other fields."""
        fields = dict(values)
        try:
            fields["classes"] = tuple(ClassScores(**row) for row in fields.get("classes", ()))
            fields["confusion"] = tuple(tuple(row) for row in fields.get("confusion", ()))
            return cls(**fields)
        except TypeError as error:
            raise DataError(
                f"metrics.jsonl: these are not the scores of a task: {str(dict(values))[:80]}"
            ) from error


def class_names(task: Task) -> tuple[str, ...]:
    """The names of a task's classes; their numbers where the task names none."""
    return task.class_names or tuple(str(number) for number in range(task.classes))


def headline_name(task: Task) -> str:
    """The name of the metric that a task is judged by: `accuracy` or `Pearson`."""
    return "Pearson" if task.kind == "similarity" else "accuracy"


def second_name(task: Task) -> str:
    """The name of the metric shown beside the headline: `macro F1` or `Spearman`."""
    return "Spearman" if task.kind == "similarity" else "macro F1"


def metric_fields(task: Task) -> tuple[str, str]:
    """The fields of TaskScores, and the keys in metrics.jsonl, of the headline and of the second metric."""
    return ("pearson", "spearman") if task.kind == "similarity" else ("accuracy", "macro_f1")


def score(task: Task, labels: np.ndarray, outputs: np.ndarray) -> TaskScores:
    """Score outputs [n, k] against labels [n]; no examples give zeros.

    Outputs are class logits [n, classes], one logit [n, 1] (binary) or a score in label units [n, 1]
    (similarity). Raises NonFiniteError when an output is NaN or infinite.
    """
    outputs = check_outputs(task, outputs)
    labels = np.asarray(labels)
    if labels.shape != (len(outputs),):
        raise ValueError(f"{task.name}: labels {labels.shape} do not fit outputs {outputs.shape}")
    if task.kind == "similarity":
        return _similarity_scores(task, labels.astype(np.float64), outputs[:, 0])
    return _class_scores(task, labels.astype(np.int64), predictions_from_outputs(task, outputs))


def _class_scores(task: Task, labels: np.ndarray, predicted: np.ndarray) -> TaskScores:
    confusion = confusion_matrix(labels, predicted, task.classes)
    hits, support, chosen = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    precision = hits / np.maximum(chosen, 1)
    recall = hits / np.maximum(support, 1)
    f1 = 2 * hits / np.maximum(support + chosen, 1)
    seen = (support + chosen) > 0
    names = class_names(task)
    means = moments(labels, predicted).mean(axis=0) if task.ordered and len(labels) else np.zeros(6)
    return TaskScores(
        mean_absolute_error=float(mean_absolute_error(means)) if task.ordered else None,
        quadratic_kappa=float(quadratic_kappa(means)) if task.ordered else None,
        kind=task.kind,
        examples=len(labels),
        accuracy=float(hits.sum() / max(len(labels), 1)),
        # Classes that occur neither as label nor as prediction do not count, as in scikit-learn's default.
        macro_f1=float(f1[seen].mean()) if seen.any() else 0.0,
        classes=tuple(
            ClassScores(name, float(p), float(r), float(f), int(s), int(c))
            for name, p, r, f, s, c in zip(names, precision, recall, f1, support, chosen, strict=True)
        ),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
    )


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts int64 [classes, classes]: rows are true classes, columns predicted ones."""
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(f"labels must lie in 0..{classes - 1}, found {labels.min()}..{labels.max()}")
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def _similarity_scores(task: Task, labels: np.ndarray, predicted: np.ndarray) -> TaskScores:
    squared = float(np.mean((predicted - labels) ** 2)) if len(labels) else 0.0
    return TaskScores(
        kind=task.kind,
        examples=len(labels),
        pearson=correlation(labels, predicted, name=task.name),
        spearman=correlation(rankdata(labels), rankdata(predicted)),
        mse=squared,
    )


def correlation(labels: np.ndarray, predicted: np.ndarray, name: str | None = None) -> float:
    """Pearson's correlation of two float vectors [n]; 0 where one of them is constant.

    With a `name`, a ConstantScoresWarning says which task met constant values.
    """
    centred = [_centred(np.asarray(values, dtype=np.float64)) for values in (labels, predicted)]
    if centred[0] is None or centred[1] is None:
        if name is not None:
            which = "labels" if centred[0] is None else "predictions"
            warnings.warn(
                f"{name}: all {len(labels)} {which} are the same: no correlation is defined, 0 is reported",
                ConstantScoresWarning,
                stacklevel=4,
            )
        return 0.0
    return float(np.clip(centred[0] @ centred[1], -1.0, 1.0))


def _centred(values: np.ndarray) -> np.ndarray | None:
    """`values` minus their mean with norm 1, or None where they are constant up to rounding."""
    if len(values) < 2:
        return None
    mean = values.mean()
    difference = values - mean
    norm = float(np.linalg.norm(difference))
    return None if norm <= 1e-13 * abs(mean) * len(values) ** 0.5 or norm == 0.0 else difference / norm


def overall_of(sst: Any, para: Any, sts: Any) -> Any:
    """`(SST + paraphrase + (STS + 1) / 2) / 3` of headline values: floats or arrays."""
    return (sst + para + (sts + 1) / 2) / 3


def mean_of(sst: Any, para: Any, sts: Any) -> Any:
    """`(SST + paraphrase + STS) / 3` of headline values: floats or arrays."""
    return (sst + para + sts) / 3


def overall(scores: Mapping[str, TaskScores]) -> float | None:
    """The course's overall score; None unless sst, para and sts are all there."""
    return overall_of(*_trio(scores)) if all(name in scores for name in COURSE_TRIO) else None


def mean(scores: Mapping[str, TaskScores]) -> float | None:
    """The plain mean of the three headline scores; None unless sst, para and sts are all there."""
    return mean_of(*_trio(scores)) if all(name in scores for name in COURSE_TRIO) else None


def _trio(scores: Mapping[str, TaskScores]) -> list[float]:
    return [scores[name].headline for name in COURSE_TRIO]


def selection_score(scores: Mapping[str, TaskScores]) -> float:
    """The number by which checkpoints are chosen and training stops early: higher is better.

    `overall` when sst, para and sts are all there, else the mean of the headline scores of the tasks at hand.
    """
    joint = overall(scores)
    if joint is not None:
        return joint
    if not scores:
        raise ValueError("no task has scores")
    return sum(result.headline for result in scores.values()) / len(scores)


def aggregates(scores: Mapping[str, TaskScores]) -> dict[str, float | None]:
    """`overall`, `mean` (None unless defined) and the selection `score`, as an evaluation line holds them."""
    return {"overall": overall(scores), "mean": mean(scores), "score": selection_score(scores)}
