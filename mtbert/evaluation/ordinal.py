"""Scores of classes that have an order, where a neighbouring class is less wrong than a distant one."""

from __future__ import annotations

from typing import Any

import numpy as np


def moments(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """What both scores are functions of, once averaged over examples: float64 [n, 6]."""
    y, p = np.asarray(labels, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    return np.stack([np.abs(y - p), (y - p) ** 2, y, p, y * y, p * p], axis=-1)


def mean_absolute_error(means: np.ndarray) -> Any:
    """Mean distance of the predicted from the true class, in classes, of mean moments [..., 6]."""
    return means[..., 0]


def quadratic_kappa(means: np.ndarray) -> Any:
    """Cohen's kappa with quadratic weights (Cohen 1968, "Weighted kappa") of mean moments [..., 6].

    1 less the mean squared distance over that of labels and predictions which know nothing of each other: 1 where all
    agree, 0 for chance, and for what is undefined (labels and predictions all one and the same class).
    """
    observed, y, p, yy, pp = np.moveaxis(means[..., 1:], -1, 0)
    expected = yy + pp - 2 * y * p
    defined = expected > 1e-12
    return np.where(defined, 1 - observed / np.where(defined, expected, 1.0), 0.0)
