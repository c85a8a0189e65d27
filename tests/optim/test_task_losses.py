"""The tasks' losses against hand-written formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtbert.errors import ConfigError
from mtbert.losses.task_losses import LossConfig, TaskLoss, per_example_loss
from mtbert.tasks.registry import get_task


def test_cross_entropy_with_weights_and_smoothing() -> None:
    logits = torch.randn(7, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4, 4, 0])
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    loss = per_example_loss("classification", logits, labels, class_weights=weights, label_smoothing=0.1)
    log_p = logits.log_softmax(1)
    target = torch.full((7, 5), 0.1 / 5, dtype=torch.float64)
    target[torch.arange(7), labels] += 0.9
    torch.testing.assert_close(loss, -(target * log_p).sum(1) * weights.double()[labels])


def test_binary_loss_with_smoothing() -> None:
    logits, labels = torch.randn(6, 1, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])
    p = torch.sigmoid(logits[:, 0])
    target = labels * 0.8 + 0.1
    expected = -(target * p.log() + (1 - target) * (1 - p).log())
    torch.testing.assert_close(per_example_loss("binary", logits, labels, label_smoothing=0.2), expected)


def test_similarity_loss_is_scaled_to_the_range() -> None:
    loss = per_example_loss(
        "similarity", torch.tensor([[5.0], [1.0]]), torch.tensor([0.0, 2.0]), score_range=(0.0, 5.0)
    )
    torch.testing.assert_close(loss, torch.tensor([1.0, 0.04]))


def test_balanced_class_weights_average_to_one_over_the_examples() -> None:
    labels = np.array([0] * 6 + [1] * 2)
    loss = TaskLoss(get_task("para"), LossConfig(class_weights="balanced"), labels)
    assert loss.class_weights is not None
    assert loss.class_weights.tolist() == pytest.approx([8 / 12, 2.0])
    assert float(loss.class_weights[torch.from_numpy(labels)].mean()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("task", "weights", "message"),
    [
        ("para", [1.0], "expected 2 numbers"),
        ("sts", "balanced", "has no classes"),
        ("sst", "balanced", r"no example has class \[1, 2, 3, 4\]"),
        ("para", [1.0, float("nan")], "expected 2 numbers"),
        ("para", [0.0, 0.0], r"found \[0.0, 0.0\], which is 0 for every class .* \(0\); possible: above 0"),
        ("sst", [0.0, 1.0, 1.0, 1.0, 1.0], r"0 for every class that training examples have \(0\)"),
    ],
)
def test_unfit_class_weights_are_refused(task: str, weights: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TaskLoss(get_task(task), LossConfig(class_weights=weights), np.zeros(4, dtype=np.int64))  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [{"weight": -1.0}, {"weight": float("inf")}, {"label_smoothing": 1.0}])
def test_impossible_loss_settings_name_their_field(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"loss.{next(iter(values))}"):
        LossConfig(**values)
