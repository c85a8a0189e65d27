"""The examples that a model gets most wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mtbert.evaluation.predictions import Predictions, predictions_from_outputs, probabilities

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task


@dataclass(frozen=True)
class WorstError:
    """One mistake: its place in the table, its id, label and prediction, and how bad it is.

    `badness` is the probability given to the wrong class, or the absolute error of a score in label units.
    """

    index: int
    id: str
    label: float
    prediction: float
    badness: float


def worst_errors(task: Task, predictions: Predictions, count: int = 8) -> list[WorstError]:
    """At most `count` mistakes, the worst first: confident wrong classes, or a score's largest errors."""
    if predictions.labels is None or not len(predictions):
        return []
    labels = predictions.labels
    predicted = predictions_from_outputs(task, predictions.outputs)
    if task.kind == "similarity":
        badness = np.abs(predicted - labels)
        wrong = badness > 0
    else:
        badness = probabilities(task, predictions.outputs).max(axis=1)
        wrong = predicted != labels
    order = np.argsort(-badness, kind="stable")
    chosen = order[wrong[order]][:count]
    return [
        WorstError(int(i), predictions.ids[i], float(labels[i]), float(predicted[i]), float(badness[i]))
        for i in chosen
    ]
