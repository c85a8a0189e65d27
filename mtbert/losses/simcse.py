"""SimCSE (Gao, Yao and Chen 2021, "SimCSE: Simple Contrastive Learning of Sentence Embeddings")."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mtbert.data.dataset import TaskData
from mtbert.errors import ConfigError
from mtbert.losses.contrastive import LARGEST_SCALE, ranking_losses
from mtbert.losses.objective import ObjectiveContext, Pass
from mtbert.losses.pairs import (
    EmbeddingObjective,
    Embeddings,
    OwnRows,
    Triples,
    batches_of,
    check_batches,
    check_objective,
    on_device,
    positive_pairs,
    trained_on,
    triples,
)
from mtbert.losses.paraphrases import text_identities
from mtbert.model.heads import Pooling


@dataclass
class SimCseConfig:
    """SimCSE: find each sentence's other view, or its paraphrase, in the batch."""

    tasks: list[str] = field(default_factory=list)
    """Tasks whose sentences have it; none by default."""
    supervised: bool = False
    """Paraphrases as positives and known non-paraphrases as hard negatives (pair tasks), instead of the same sentence
    under another dropout mask."""
    weight: float = 1.0
    """Weight beside the tasks' own losses."""
    temperature: float = 0.05
    """What cosines are divided by."""
    pooling: Pooling = "cls"
    """How a sentence's tokens become its embedding."""
    batch_size: int | None = None
    """Sentences (supervised: pairs) of a step, in an order of their own; by default those of the task's batch."""
    threshold: float = 4.0
    """Similarity from which on a pair counts as paraphrases (supervised)."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(f"simcse.weight: expected a number above 0, found {self.weight}")
        if not 1 / LARGEST_SCALE <= self.temperature < math.inf:
            raise ConfigError(
                f"simcse.temperature: expected a number of at least {1 / LARGEST_SCALE:g}, found {self.temperature}"
            )
        if self.batch_size is not None and self.batch_size < 2:
            raise ConfigError(
                "simcse.batch_size: negatives are taken from the batch; expected at least 2, "
                f"found {self.batch_size}"
            )


def unsupervised_losses(views: Tensor, temperature: float = 0.05) -> Tensor:
    """Losses `[n]` of n different sentences with two views each, `[n, 2, C]`: equation 1 of the paper."""
    return ranking_losses(views[:, 0], views[:, 1], 1 / temperature)


def supervised_losses(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    groups: Tensor,
    negative_groups: Tensor,
    temperature: float = 0.05,
) -> Tensor:
    """Losses `[n]` of n pairs of paraphrases `[n, C]` with m <= n hard negatives `[m, C]`: equation 5 of the paper.

    groups `[n]`, negative_groups `[m]` int64: candidates of the anchor's own group are not its negatives.
    """
    candidates = torch.cat((positives, negatives))
    return ranking_losses(anchors, candidates, 1 / temperature, groups, torch.cat((groups, negative_groups)))


class UnsupervisedSimCse(EmbeddingObjective):
    """Each sentence is packed twice: its two rows have different dropout masks.

    Every sentence of a pair is a sentence of its own, and no sentence is twice in a step. The paper's MLP over
    [CLS], which is dropped after training, is left out; pooling `pooler` is the nearest to it. Negatives are
    the other sentences of the same pass, on all ranks: a step that is split has fewer.
    """

    def __init__(self, config: SimCseConfig, sources: Mapping[str, OwnRows]) -> None:
        super().__init__("simcse", sources, config.pooling, config.weight)
        self.temperature = config.temperature

    def per_example(self, task: str, found: Embeddings, run: Pass) -> Tensor:
        """Losses of the sentences of a pass."""
        return unsupervised_losses(found.rows, self.temperature)


class SupervisedSimCse(EmbeddingObjective):
    """Paraphrases as positives; hard negatives are texts that a pair labelled 0 tells apart from the paraphrases.

    Not every pair has a hard negative; those of the pass are candidates for all of its anchors, as in the paper.
    Similarity scores tell no hard negatives. Texts that known paraphrases connect are not negatives of each other.
    Negatives are those of the same pass, on all ranks: a step that is split has fewer.
    """

    def __init__(self, config: SimCseConfig, tasks: Mapping[str, Triples]) -> None:
        super().__init__(
            "simcse", {name: t.source for name, t in tasks.items()}, config.pooling, config.weight
        )
        self.temperature = config.temperature
        self.triples = dict(tasks)

    def per_example(self, task: str, found: Embeddings, run: Pass) -> Tensor:
        """Losses of the pairs of a pass."""
        known, rows = self.triples[task], found.rows
        negative_groups = known.negative_groups[found.examples]
        places = np.flatnonzero(negative_groups >= 0)
        negatives = rows[:, -1].index_select(0, on_device(places, rows))
        return supervised_losses(
            rows[:, 0],
            rows[:, 1],
            negatives,
            on_device(known.groups[found.examples], rows),
            on_device(negative_groups[places], rows),
            self.temperature,
        )


def build_simcse(
    config: SimCseConfig, context: ObjectiveContext
) -> UnsupervisedSimCse | SupervisedSimCse | None:
    """The objective, or None when no task has it; ConfigError for tasks that cannot."""
    if not config.tasks:
        return None
    check_objective("simcse", config.tasks, context, pairs=config.supervised)
    if config.batch_size is None:
        single = [name for name in config.tasks if config.supervised or not context.tasks[name].is_pair]
        check_batches("simcse", single, context)
    if not config.supervised:
        return UnsupervisedSimCse(config, {task: _sentences(task, config, context) for task in config.tasks})
    found = {}
    for task in config.tasks:
        positive = positive_pairs("simcse", task, context, config.threshold)
        found[task] = triples("simcse", task, context, positive, config.batch_size)
    return SupervisedSimCse(config, found)


def _sentences(task: str, config: SimCseConfig, context: ObjectiveContext) -> OwnRows:
    """Every different sentence of a task twice; a step takes those of the task's examples, or a batch of its own."""
    settings = context.task_configs[task]
    identities, used = text_identities(context.tokenised[task]), trained_on(task, context)
    _, first, sentences = np.unique(identities[used], return_index=True, return_inverse=True)
    texts = np.arange(identities.size).reshape(identities.shape)[used].reshape(-1)[first]
    numbers = np.full(identities.shape, -1)
    numbers[used] = sentences.reshape(-1, identities.shape[1])
    if len(texts) < 2:
        raise ConfigError(
            f"simcse.tasks: expected at least 2 different sentences of {task}, found {len(texts)}"
        )
    data = TaskData.of_texts(
        f"{task}/simcse",
        context.tokenised[task],
        np.stack([texts, texts], axis=1),
        task=task,
        max_length=settings.max_length,
        truncate=settings.truncate,
    )
    if config.batch_size is not None:
        return OwnRows(data, batches_of(data, config.batch_size, context.seed))
    return OwnRows(data, lambda examples, step: np.unique(numbers[examples]))
