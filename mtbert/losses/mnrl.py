"""Multiple negatives ranking loss (Henderson et al. 2017, "Efficient Natural Language Response Suggestion")."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.losses.contrastive import LARGEST_SCALE, ranking_losses
from mtbert.losses.objective import ObjectiveContext, Pass
from mtbert.losses.pairs import (
    EmbeddingObjective,
    Embeddings,
    Source,
    check_batches,
    check_objective,
    on_device,
    pair_source,
    positive_pairs,
)
from mtbert.losses.paraphrases import Paraphrases
from mtbert.model.heads import Pooling


@dataclass
class MnrlConfig:
    """Multiple negatives ranking loss: find each text's paraphrase among those of the batch."""

    tasks: list[str] = field(default_factory=list)
    """Pair tasks that have it, paraphrases or similarities; none by default."""
    weight: float = 1.0
    """Weight beside the tasks' own losses."""
    scale: float = 20.0
    """What cosines are multiplied by: the inverse of the temperature."""
    symmetric: bool = False
    """Also find the first text among those of the batch, given the second; the loss is the mean of the two."""
    pooling: Pooling = "mean"
    """How a text's tokens become its embedding."""
    threshold: float = 4.0
    """Similarity from which on a pair counts as paraphrases."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(f"mnrl.weight: expected a number above 0, found {self.weight}")
        if not 0 < self.scale <= LARGEST_SCALE:
            raise ConfigError(
                f"mnrl.scale: expected a number above 0 and at most {LARGEST_SCALE:g}, found {self.scale}"
            )


def mnrl_losses(
    first: Tensor, second: Tensor, groups: Tensor, scale: float = 20.0, symmetric: bool = False
) -> Tensor:
    """Losses `[n]` of n pairs of paraphrases, `[n, C]` each, with the score S = scale x cosine.

        J_i = -S(x_i, y_i) + log sum_j e^(S(x_i, y_j))

    groups: int64 `[n]`; a pair of the same group is no negative. symmetric: the mean with the same loss from y to x, as
    sentence-transformers has it.
    """
    losses = ranking_losses(first, second, scale, groups, groups)
    if symmetric:
        losses = (losses + ranking_losses(second, first, scale, groups, groups)) / 2
    return losses


class Mnrl(EmbeddingObjective):
    """The loss over the paraphrases of a pass.

    As sentence-transformers defines it, only paraphrases are anchors and candidates: other pairs of the batch stay
    out, and the mean is over the step's paraphrases. Pairs that share a text, or that known paraphrases connect, are
    not negatives of each other. The negatives are those of the same pass, on all
    ranks: a step that is split has fewer.
    """

    def __init__(
        self, config: MnrlConfig, sources: Mapping[str, Source], groups: Mapping[str, np.ndarray]
    ) -> None:
        """groups: int64 [examples of the task], the group of paraphrases that each of them belongs to."""
        super().__init__("mnrl", sources, config.pooling, config.weight)
        self.config = config
        self.groups = dict(groups)

    def per_example(self, task: str, found: Embeddings, run: Pass) -> Tensor:
        """Losses of the pairs of a pass."""
        first, second = found.rows.unbind(1)
        groups = on_device(self.groups[task][found.examples], first)
        return mnrl_losses(first, second, groups, self.config.scale, self.config.symmetric)


def build_mnrl(config: MnrlConfig, context: ObjectiveContext) -> Mnrl | None:
    """The objective, or None when no task has it; ConfigError for tasks that cannot."""
    if not config.tasks:
        return None
    check_objective("mnrl", config.tasks, context, pairs=True)
    check_batches("mnrl", config.tasks, context)
    sources, groups = {}, {}
    for task in config.tasks:
        positive = positive_pairs("mnrl", task, context, config.threshold)
        sources[task] = pair_source("mnrl", task, context, config.pooling, positive)
        groups[task] = Paraphrases(context.tokenised[task], positive).groups[:, 0]
    return Mnrl(config, sources, groups)
