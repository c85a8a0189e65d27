"""One training step on several tasks: the sum of their mean losses, one backward pass, clipping, AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtbert.reference.heads import MultitaskBert
from mtbert.reference.minbert import Rows


@dataclass
class TaskBatch:
    """The examples of one task in one step."""

    task: str
    kind: str
    """classification, binary or similarity."""
    labels: Tensor
    """[n] int64 classes, or scores."""
    first: Rows
    """The sentences, the first sentences of the pairs, or the cross-encoded pairs."""
    second: Rows | None = None
    """The second sentences of pairs that are encoded apart."""
    weight: float = 1.0
    """Weight of the task's loss in the sum."""
    score_range: tuple[float, float] | None = None
    """Lowest and highest label of a similarity task."""
    class_weights: Tensor | None = None
    """[classes] weight of an example by its class."""
    label_smoothing: float = 0.0
    """Share of the probability that is spread evenly over the classes."""


def task_loss(batch: TaskBatch, outputs: Tensor) -> Tensor:
    """Mean loss of one task's examples, a scalar. outputs: [n, outputs]."""
    if batch.kind == "classification":
        losses = F.cross_entropy(
            outputs, batch.labels, reduction="none", label_smoothing=batch.label_smoothing
        )
    elif batch.kind == "binary":
        smoothed = batch.labels.to(outputs.dtype) * (1 - batch.label_smoothing) + batch.label_smoothing / 2
        losses = F.binary_cross_entropy_with_logits(outputs[:, 0], smoothed, reduction="none")
    else:
        assert batch.score_range is not None
        low, high = batch.score_range
        target = (batch.labels.to(outputs.dtype) - low) / (high - low)
        losses = F.mse_loss((outputs[:, 0] - low) / (high - low), target, reduction="none")
    if batch.class_weights is not None:
        losses = losses * batch.class_weights[batch.labels]
    return losses.mean()


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float = 0.01) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); as for BERT, weight decay spares biases and LayerNorm."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate)


def training_step(
    model: MultitaskBert,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[TaskBatch],
    *,
    max_norm: float | None = 1.0,
) -> dict[str, float]:
    """Train on one batch of every task; returns each task's mean loss.

    max_norm: the norm that the gradient of all parameters together is clipped to.
    """
    model.train()
    optimizer.zero_grad()
    losses = {batch.task: task_loss(batch, model(batch.task, batch.first, batch.second)) for batch in batches}
    total = torch.stack([batch.weight * losses[batch.task] for batch in batches]).sum()
    total.backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return {task: loss.item() for task, loss in losses.items()}
