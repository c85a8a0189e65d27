"""The loss of each kind of task, per example, so that passes and ranks can divide by the step's own count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.tasks.registry import Kind, Task


@dataclass
class LossConfig:
    """The loss of one task."""

    weight: float = 1.0
    """Weight of the task's mean loss in the sum over tasks; with 0 it is evaluated, and trained by objectives alone."""
    class_weights: Literal["none", "balanced"] | list[float] = "none"
    """Weight of an example by its class: none, balanced (count / (classes * count of the class)) or a list."""
    label_smoothing: float = 0.0
    """Share of the probability spread evenly over the classes (cross-entropy and binary cross-entropy)."""

    def __post_init__(self) -> None:
        if not (self.weight >= 0 and np.isfinite(self.weight)):
            raise ConfigError(f"loss.weight: expected a number of at least 0, found {self.weight}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError(
                f"loss.label_smoothing: expected at least 0 and below 1, found {self.label_smoothing}"
            )


def per_example_loss(
    kind: Kind,
    outputs: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    score_range: tuple[float, float] | None = None,
) -> Tensor:
    """Loss of each example, `[n]` in the dtype of `outputs`.

    outputs: `[n, classes]` logits, `[n, 1]` one logit (binary) or `[n, 1]` scores in label units.
    labels: `[n]` classes (int64) or scores. Similarity: the squared error of the score scaled to 0..1.
    """
    if kind == "classification":
        loss = F.cross_entropy(outputs, labels, reduction="none", label_smoothing=label_smoothing)
    elif kind == "binary":
        targets = labels.to(outputs.dtype) * (1.0 - label_smoothing) + 0.5 * label_smoothing
        loss = F.binary_cross_entropy_with_logits(outputs.squeeze(-1), targets, reduction="none")
    else:
        if score_range is None:
            raise ValueError("a similarity loss needs score_range")
        low, high = score_range
        difference = (outputs.squeeze(-1) - labels.to(outputs.dtype)) / (high - low)
        return difference.square()
    return loss if class_weights is None else loss * class_weights.to(outputs.dtype)[labels]


def class_weight_tensor(task: Task, config: LossConfig, train_labels: np.ndarray) -> Tensor | None:
    """The weight of each class, `[classes]` float32, or None when every example counts the same.

    `balanced` weights average to 1 over the training examples, so that the loss keeps its scale.
    """
    if config.class_weights == "none":
        return None
    if task.kind == "similarity":
        raise ConfigError(f"{task.name}.loss.class_weights: a similarity task has no classes")
    if config.class_weights == "balanced":
        counts = np.bincount(train_labels, minlength=task.classes)
        if (counts == 0).any():
            missing = [int(c) for c in np.flatnonzero(counts == 0)]
            raise ConfigError(f"{task.name}.loss.class_weights: balanced, but no example has class {missing}")
        return torch.tensor(counts.sum() / (task.classes * counts), dtype=torch.float32)
    weights: Sequence[float] = config.class_weights
    if len(weights) != task.classes or not all(0 <= weight < math.inf for weight in weights):
        raise ConfigError(
            f"{task.name}.loss.class_weights: expected {task.classes} numbers of at least 0, found {weights}"
        )
    present = [int(label) for label in np.unique(train_labels)]
    if not any(weights[label] for label in present):
        raise ConfigError(
            f"{task.name}.loss.class_weights: found {weights}, which is 0 for every class that training examples have"
            f" ({', '.join(map(str, present))}); possible: above 0 for one of them, or {task.name}.loss.weight 0"
        )
    return torch.tensor(weights, dtype=torch.float32)


class TaskLoss:
    """One task's loss with its settings resolved against the training labels."""

    def __init__(self, task: Task, config: LossConfig, train_labels: np.ndarray) -> None:
        if task.kind == "similarity" and config.label_smoothing:
            raise ConfigError(f"{task.name}.loss.label_smoothing: a similarity task has no classes to smooth")
        self.task = task
        self.weight = config.weight
        self.label_smoothing = config.label_smoothing
        self.class_weights = class_weight_tensor(task, config, train_labels)
        self.compute: Callable[[Tensor, Tensor], Tensor] = self._compute
        """What `per_example` calls; it may be compiled."""

    def to(self, device: torch.device) -> TaskLoss:
        """Move the class weights to `device`; returns self."""
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(device)
        return self

    def per_example(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """`[n]` losses, before the task's weight."""
        return self.compute(outputs, labels)

    def _compute(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return per_example_loss(
            self.task.kind,
            outputs,
            labels,
            class_weights=self.class_weights,
            label_smoothing=self.label_smoothing,
            score_range=self.task.score_range,
        )
