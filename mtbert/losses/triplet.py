"""Triplet loss of a Siamese encoder (Reimers and Gurevych 2019, "Sentence-BERT", section 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.losses.objective import ObjectiveContext, Pass, check_tasks
from mtbert.losses.pairs import (
    EmbeddingObjective,
    Embeddings,
    Triples,
    check_objective,
    on_device,
    positive_pairs,
    triples,
)
from mtbert.model.heads import Pooling


@dataclass
class TripletConfig:
    """Triplet loss: a text is nearer to its duplicate than to another text, by a margin."""

    tasks: list[str] = field(default_factory=list)
    """Paraphrase tasks that have it; none by default."""
    weight: float = 1.0
    """Weight beside the tasks' own losses."""
    margin: float = 1.0
    """How much nearer, in Euclidean distance."""
    pooling: Pooling = "mean"
    """How a text's tokens become its embedding."""

    def __post_init__(self) -> None:
        for name in ("weight", "margin"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"triplet.{name}: expected a number above 0, found {value}")


def triplet_losses(anchors: Tensor, positives: Tensor, negatives: Tensor, margin: float = 1.0) -> Tensor:
    """Losses `[n]` of triplets `[n, C]` each: max(0, |a - p| - |a - n| + margin), Euclidean."""
    near = torch.linalg.vector_norm(anchors - positives, dim=-1)
    far = torch.linalg.vector_norm(anchors - negatives, dim=-1)
    return (near - far + margin).clamp(min=0)


def in_batch_negatives(groups: np.ndarray) -> np.ndarray:
    """For each example the next one, in a circle, of another group, int64 [n]; -1 where all are of its own group."""
    n = len(groups)
    order = (np.arange(n)[:, None] + np.arange(1, n)) % max(n, 1)
    other = groups[order] != groups[:, None]
    if n < 2:
        return np.full(n, -1, dtype=np.int64)
    return np.where(other.any(axis=1), order[np.arange(n), other.argmax(axis=1)], -1)


class TripletObjective(EmbeddingObjective):
    """An anchor with a duplicate, and a text that a pair labelled 0 tells apart from them.

    A pair without such a text takes the duplicate of another pair of its pass that is not known to be a paraphrase;
    where its pass has none either, it costs nothing.
    """

    def __init__(self, config: TripletConfig, tasks: Mapping[str, Triples]) -> None:
        super().__init__(
            "triplet", {name: t.source for name, t in tasks.items()}, config.pooling, config.weight
        )
        self.margin = config.margin
        self.triples = dict(tasks)

    def per_example(self, task: str, found: Embeddings, run: Pass) -> Tensor:
        """Losses of the triplets of a pass."""
        known, k = self.triples[task], found.rows.shape[1]
        places = np.arange(len(found.examples))
        borrowed = in_batch_negatives(known.groups[found.examples])
        # Rows of the flattened [m * k, C]: a negative of its own is the third of its example's rows.
        negatives = np.where(borrowed >= 0, borrowed * k + 1, -1)
        own = known.negative_groups[found.examples] >= 0
        negatives[own] = places[own] * k + 2
        used = places[negatives >= 0]
        rows = found.rows.flatten(0, 1)
        anchors, positives, others = (
            rows.index_select(0, on_device(numbers, rows))
            for numbers in (used * k, used * k + 1, negatives[used])
        )
        return triplet_losses(anchors, positives, others, self.margin)


def build_triplet(config: TripletConfig, context: ObjectiveContext) -> TripletObjective | None:
    """The objective, or None when no task has it; ConfigError for tasks that cannot, or that have no triplets."""
    if not config.tasks:
        return None
    binary = [name for name, task in context.tasks.items() if task.is_pair and task.kind == "binary"]
    check_tasks("triplet.tasks", config.tasks, binary, "needs pairs labelled as paraphrases")
    check_objective("triplet", config.tasks, context, pairs=True)
    found = {}
    for task in config.tasks:
        positive = positive_pairs("triplet", task, context, threshold=0.0, least=1)
        found[task] = triples("triplet", task, context, positive)
        if (found[task].negative_groups >= 0).any():
            continue
        if len(np.unique(found[task].groups)) < 2:
            raise ConfigError(
                f"triplet.tasks: no training pair of {task} has a text that differs from its two"
            )
        if context.task_configs[task].batch_size < 2:
            raise ConfigError(
                f"{task}.batch_size: no text of {task} has a paraphrase and a known non-paraphrase, so triplet takes "
                "its negatives from the batch; expected at least 2, found 1"
            )
    return TripletObjective(config, found)
