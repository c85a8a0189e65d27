"""Whether a model's probabilities mean what they say, and how much one temperature would mend (Guo et al. 2017,
"On Calibration of Modern Neural Networks")."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import minimize_scalar

from mtbert.evaluation.halves import selection_half
from mtbert.evaluation.predictions import Predictions, check_outputs, class_logits
from mtbert.evaluation.table import Cell

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task

BINS = 15
"""Of equal width, over confidences from 0 to 1, as in the paper."""
_LOWEST, _HIGHEST = 0.05, 20.0
"""Temperatures that are tried: outside of them there is hardly anything left to fit."""


@dataclass(frozen=True)
class ConfidenceBin:
    """The examples whose confidence, the probability of the predicted class, is above `low` and at most `high`."""

    low: float
    high: float
    examples: int
    confidence: float
    """Mean; 0 for an empty bin, as is the accuracy."""
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """How far probabilities are from what comes true; lower is better for all three."""

    examples: int
    ece: float
    """Expected calibration error: the bins' gaps between mean confidence and accuracy, weighted by their examples."""
    brier: float
    """Mean squared distance of the probabilities from the truth: summed over the classes (Brier 1950, 0 to 2); for two
    classes of that one of them (0 to 1)."""
    nll: float
    """Mean negative log likelihood of the true class, in nats."""
    bins: tuple[ConfidenceBin, ...]


@dataclass(frozen=True)
class Tempered:
    """What dividing all logits by one number does: fitted to one half of the examples, shown on the other."""

    temperature: float
    """Above 1: the model is too sure of itself."""
    before: Calibration
    """Of the half that took no part in the fit; so is `after`."""
    after: Calibration


@dataclass(frozen=True)
class CalibrationReport:
    """Calibration of predictions as they are, and with a temperature."""

    whole: Calibration
    tempered: Tempered | None
    """None where the examples are too few for two halves."""

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def calibration(task: Task, labels: np.ndarray, outputs: np.ndarray, temperature: float = 1.0) -> Calibration:
    """Of outputs [n, k] for labels int64 [n], the logits divided by `temperature`; no examples give zeros.

    Raises NonFiniteError for outputs that are NaN or infinite.
    """
    logs = _log_probabilities(task, outputs, temperature)
    labels = np.asarray(labels, dtype=np.int64)
    count = len(labels)
    if not count:
        return Calibration(0, 0.0, 0.0, 0.0, _bins(np.zeros(0), np.zeros(0)))
    chances = np.exp(logs)
    truth = np.eye(task.classes)[labels]
    squares = ((chances - truth) ** 2).sum(axis=1) / (2 if task.classes == 2 else 1)
    bins = _bins(chances.max(axis=1), (logs.argmax(axis=1) == labels).astype(np.float64))
    gaps = sum(each.examples * abs(each.confidence - each.accuracy) for each in bins)
    true = logs[np.arange(count), labels]
    return Calibration(count, gaps / count, float(squares.mean()), float(-true.mean()), bins)


def fitted_temperature(task: Task, labels: np.ndarray, outputs: np.ndarray) -> float:
    """The temperature with the least negative log likelihood for these examples, .05 to 20."""
    places = np.arange(len(labels)), np.asarray(labels, dtype=np.int64)

    def nll(log_temperature: float) -> float:
        return float(-_log_probabilities(task, outputs, np.exp(log_temperature))[places].mean())

    found = minimize_scalar(nll, bounds=(np.log(_LOWEST), np.log(_HIGHEST)), method="bounded")
    return float(np.exp(found.x))


def calibration_report(
    task: Task, predictions: Predictions, *, halved: bool = False
) -> CalibrationReport | None:
    """Of labelled predictions of a task with classes; None for others, and where there are no examples.

    halved: one half chose the checkpoint, so that all figures are of the other.
    """
    labels = predictions.labels
    if task.kind == "similarity" or labels is None or not len(predictions):
        return None
    outputs = check_outputs(task, predictions.outputs)
    fitting = selection_half(predictions.ids, labels)
    tempered = None
    if 0 < fitting.sum() < len(labels):
        temperature = fitted_temperature(task, labels[fitting], outputs[fitting])
        rest = labels[~fitting], outputs[~fitting]
        tempered = Tempered(temperature, calibration(task, *rest), calibration(task, *rest, temperature))
    if halved and tempered is not None:
        return CalibrationReport(tempered.before, tempered)
    return CalibrationReport(calibration(task, labels, outputs), tempered)


def calibration_rows(report: CalibrationReport) -> tuple[list[str], list[list[Cell]]]:
    """Headers and rows of the table, for the terminal and for Markdown."""
    rows = [_row("all examples", report.whole)]
    if report.tempered is not None:
        if report.whole.examples != report.tempered.before.examples:
            rows.append(_row("examples held out from the fit", report.tempered.before))
        else:
            rows = [_row("the report half", report.whole)]
        rows.append(
            _row(f"the same with temperature {report.tempered.temperature:.2f}", report.tempered.after)
        )
    return ["probabilities of", "examples", "calibration error", "Brier score", "log loss"], rows


def _row(name: str, found: Calibration) -> list[Cell]:
    return [name, found.examples, found.ece, found.brier, found.nll]


def _log_probabilities(task: Task, outputs: np.ndarray, temperature: float) -> np.ndarray:
    """Log-softmax float64 [n, classes]: no probability is so small that its logarithm is lost."""
    logits = class_logits(task, outputs) / temperature
    logits = logits - logits.max(axis=1, keepdims=True) if len(logits) else logits
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def _bins(confidences: np.ndarray, hits: np.ndarray) -> tuple[ConfidenceBin, ...]:
    which = np.clip(np.ceil(confidences * BINS).astype(np.int64) - 1, 0, BINS - 1)
    counts = np.bincount(which, minlength=BINS)
    sums = [
        np.bincount(which, weights=each, minlength=BINS) / np.maximum(counts, 1)
        for each in (confidences, hits)
    ]
    return tuple(
        ConfidenceBin(k / BINS, (k + 1) / BINS, int(counts[k]), float(sums[0][k]), float(sums[1][k]))
        for k in range(BINS)
    )
