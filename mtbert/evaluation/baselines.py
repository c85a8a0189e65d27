"""What one scores without reading a sentence: random chance, and the training table's commonest answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task

SCORE_BINS = 10


@dataclass(frozen=True)
class Baselines:
    """The headline metric of two guesses on the dev table.

    `chance`: every class equally often at random (expected accuracy), or random scores (Pearson 0).
    `majority`: always the commonest class of the training table, or always its mean score (Pearson 0);
    None where the tables are not known.
    """

    chance: float
    majority: float | None


def label_histogram(task: Task, labels: np.ndarray | None) -> dict[str, Any] | None:
    """A JSON-able summary of a table's labels; None for an unlabelled table.

    Classes: `{"counts": [one a class]}`. Scores: `{"edges": [...], "counts": [...], "mean": m}` with
    equal bins over the task's range; scores outside it fall into the first or last bin.
    """
    if labels is None:
        return None
    if task.score_range is None:
        counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=task.classes)
        return {"counts": counts.tolist()}
    low, high = task.score_range
    values = np.asarray(labels, dtype=np.float64)
    counts, edges = np.histogram(np.clip(values, low, high), bins=SCORE_BINS, range=(low, high))
    average = float(values.mean()) if len(values) else None
    return {"edges": edges.tolist(), "counts": counts.tolist(), "mean": average}


def baselines(task: Task, train_labels: np.ndarray | None, dev_labels: np.ndarray | None) -> Baselines:
    """The baselines of `task` from its labels [n]: the training table gives the answer, dev the score."""
    return baselines_from_histograms(
        task, label_histogram(task, train_labels), label_histogram(task, dev_labels)
    )


def baselines_from_histograms(
    task: Task, train: Mapping[str, Any] | None, dev: Mapping[str, Any] | None
) -> Baselines:
    """The same from `label_histogram`'s summaries, which a run's folder keeps."""
    if task.kind == "similarity":
        return Baselines(chance=0.0, majority=0.0)
    chance = 1.0 / task.classes
    if train is None or dev is None or not sum(train["counts"]):
        return Baselines(chance=chance, majority=None)
    answer = int(np.argmax(train["counts"]))
    if not answer < len(dev["counts"]):
        return Baselines(chance=chance, majority=None)
    return Baselines(chance, majority=dev["counts"][answer] / max(sum(dev["counts"]), 1))
