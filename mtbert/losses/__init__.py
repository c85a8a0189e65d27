"""Losses of the tasks' heads."""

from __future__ import annotations

from mtbert.losses.task_losses import LossConfig, TaskLoss, per_example_loss

__all__ = ["LossConfig", "TaskLoss", "per_example_loss"]
