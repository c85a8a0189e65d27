"""CosineEmbeddingLoss on the embeddings of pairs, with a margin that may change over training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.losses.contrastive import cosine
from mtbert.losses.objective import ObjectiveContext, Pass
from mtbert.losses.pairs import (
    EmbeddingObjective,
    Embeddings,
    Source,
    check_objective,
    on_device,
    pair_source,
    trained_on,
)
from mtbert.model.heads import Pooling
from mtbert.tasks.registry import Task


@dataclass
class CosineEmbeddingConfig:
    """CosineEmbeddingLoss: pull alike pairs together, push others apart up to a margin."""

    tasks: list[str] = field(default_factory=list)
    """Pair tasks that have it, paraphrases or similarities; none by default."""
    weight: float = 1.0
    """Weight beside the tasks' own losses."""
    margin: float = 0.0
    """Cosine, -1 to 1, below which an unlike pair costs nothing."""
    final_margin: float | None = None
    """The margin at the end of training, reached in a straight line; by default it stays."""
    labels: Literal["threshold", "extremes"] = "threshold"
    """How similarities become like and unlike: by the threshold, or only the lowest and the highest score."""
    threshold: float = 2.5
    """Similarity from which on a pair is alike."""
    pooling: Pooling = "mean"
    """How a text's tokens become its embedding."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(f"cosine_embedding.weight: expected a number above 0, found {self.weight}")
        for name in ("margin", "final_margin"):
            value = getattr(self, name)
            if value is not None and not -1.0 <= value <= 1.0:
                raise ConfigError(f"cosine_embedding.{name}: expected a cosine from -1 to 1, found {value}")

    def margin_at(self, progress: float) -> float:
        """The margin when this share (0 to 1) of training is done."""
        final = self.margin if self.final_margin is None else self.final_margin
        return self.margin + (final - self.margin) * progress


def cosine_embedding_losses(first: Tensor, second: Tensor, targets: Tensor, margin: float) -> Tensor:
    """Losses `[n]` of pairs `[n, C]`: 1 - cos for target 1, max(0, cos - margin) for target -1 (as torch has it)."""
    similarity = cosine(first, second)
    return torch.where(targets > 0, 1 - similarity, (similarity - margin).clamp(min=0))


def pair_targets(task: Task, labels: np.ndarray, config: CosineEmbeddingConfig) -> np.ndarray:
    """1, -1 or 0 (left out) for each pair, int64 [n].

    The classes of a binary task, or, of a similarity, the two mappings of Crichton and Guo 2023, section 3.7: scores
    0 to 2 against 3 to 5 (the threshold between them), or only 0 against 5. Raises ConfigError when nothing is left.
    """
    if task.score_range is None:
        return np.where(labels == 1, 1, -1)
    low, high = task.score_range
    if config.labels == "extremes":
        targets = (labels == high).astype(np.int64) - (labels == low)
        if not targets.any():
            raise ConfigError(
                f"cosine_embedding.labels: extremes, but no training pair of {task.name} has the score {low:g} or "
                f"{high:g}; possible: threshold"
            )
        return targets
    if not low <= config.threshold <= high:
        raise ConfigError(
            f"cosine_embedding.threshold: expected {low:g} to {high:g}, the scores of {task.name}, "
            f"found {config.threshold:g}"
        )
    return np.where(labels >= config.threshold, 1, -1)


def check_both_signs(
    task: Task, targets: np.ndarray, labels: np.ndarray, config: CosineEmbeddingConfig
) -> None:
    """Raise ConfigError unless some pairs are alike and others are not: else all embeddings move the same way.

    targets, labels: those of the pairs that are trained on, [n].
    """
    if (targets > 0).any() and (targets < 0).any():
        return
    found = f"all {np.count_nonzero(targets)} training pairs of {task.name} that count are"
    found += " alike" if (targets > 0).any() else " unlike"
    if task.score_range is None or labels.min() == labels.max():
        raise ConfigError(f"cosine_embedding.tasks: {found}; possible: tasks whose pairs are of both kinds")
    if config.labels == "extremes":
        raise ConfigError(f"cosine_embedding.labels: with extremes {found}; possible: threshold")
    raise ConfigError(
        f"cosine_embedding.threshold: with {config.threshold:g} {found}; possible: above {labels.min():g}, up to"
        f" {labels.max():g}"
    )


class CosineEmbedding(EmbeddingObjective):
    """The loss over the pairs of a pass; its mean is over the step's pairs that are alike or unlike.

    De La Cruz et al. 2024 let the margin follow training (their section 4.3 leaves open how): a straight line here.
    """

    in_batch = False

    def __init__(
        self, config: CosineEmbeddingConfig, sources: Mapping[str, Source], targets: Mapping[str, np.ndarray]
    ) -> None:
        """targets: int64 [examples of the task], 1 or -1, 0 for those that the source leaves out."""
        super().__init__("cosine_embedding", sources, config.pooling, config.weight)
        self.config = config
        self.targets = dict(targets)

    def per_example(self, task: str, found: Embeddings, run: Pass) -> Tensor:
        """Losses of the pairs of a pass."""
        first, second = found.rows.unbind(1)
        targets = on_device(self.targets[task][found.examples], first)
        return cosine_embedding_losses(first, second, targets, self.config.margin_at(run.progress))


def build_cosine_embedding(
    config: CosineEmbeddingConfig, context: ObjectiveContext
) -> CosineEmbedding | None:
    """The objective, or None when no task has it; ConfigError for tasks that cannot."""
    if not config.tasks:
        return None
    check_objective("cosine_embedding", config.tasks, context, pairs=True)
    sources, targets = {}, {}
    for task in config.tasks:
        labels = context.data[task].labels
        assert labels is not None
        used = trained_on(task, context)
        targets[task] = pair_targets(context.tasks[task], labels, config) * used
        check_both_signs(context.tasks[task], targets[task][used], labels[used], config)
        sources[task] = pair_source("cosine_embedding", task, context, config.pooling, targets[task] != 0)
    return CosineEmbedding(config, sources, targets)
