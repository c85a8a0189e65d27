"""How an objective that compares embeddings comes by them: from the task's own rows, or from rows packed for it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mtbert.curriculum import Plan
from mtbert.data.batching import TaskBatches
from mtbert.data.dataset import TaskData
from mtbert.errors import ConfigError
from mtbert.losses.objective import Objective, ObjectiveContext, Pass, check_tasks
from mtbert.losses.paraphrases import Paraphrases, are_paraphrases
from mtbert.model.heads import Pooling


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of some examples, k texts each."""

    examples: np.ndarray
    """int64 `[m]`, numbers in the source."""
    rows: Tensor
    """`[m, k, C]`."""


class Source(Protocol):
    """Where an objective finds the embeddings that it compares for one task."""

    data: TaskData | None
    """The rows that are packed for it; None when the task's own rows serve."""
    stream: str
    """Where its rows are."""
    texts: int
    """k, the texts of an example."""

    def choose(self, examples: np.ndarray, step: int) -> np.ndarray | None:
        """The examples of `data` that go with the task's examples of a step."""

    def compared(self, examples: np.ndarray) -> np.ndarray:
        """Those of the stream's examples that `read` takes."""

    def read(self, run: Pass) -> Embeddings | None:
        """The embeddings that a pass holds; None when it holds none."""


class OwnRows:
    """A stream of rows beside the task's own."""

    def __init__(self, data: TaskData, choose: Callable[[np.ndarray, int], np.ndarray]) -> None:
        """choose: from the task's examples of a step and the step's number to examples of `data`."""
        self.data: TaskData | None = data
        self.stream, self.texts = data.name, data.rows_per_example
        self._choose = choose

    def choose(self, examples: np.ndarray, step: int) -> np.ndarray:
        """The examples of the stream that go with the task's examples of a step."""
        return self._choose(examples, step)

    def compared(self, examples: np.ndarray) -> np.ndarray:
        """All."""
        return examples

    def read(self, run: Pass) -> Embeddings | None:
        """The part of the stream that the pass holds."""
        segment = run.segment(self.stream)
        if segment is None:
            return None
        return Embeddings(segment.examples, run.rows[self.stream].unflatten(0, (-1, self.texts)))


class TaskPairs:
    """The rows that the task's own head reads: its pairs as two rows each."""

    data: TaskData | None = None
    texts = 2

    def __init__(self, task: str, used: np.ndarray) -> None:
        """used: bool [n], which of the task's examples are compared."""
        self.stream, self._used = task, used

    def choose(self, examples: np.ndarray, step: int) -> None:
        """Nothing is packed."""

    def compared(self, examples: np.ndarray) -> np.ndarray:
        """The used ones."""
        return examples[self._used[examples]]

    def read(self, run: Pass) -> Embeddings | None:
        """The used examples among those that the pass holds."""
        segment = run.segment(self.stream)
        if segment is None:
            return None
        places = np.flatnonzero(self._used[segment.examples])
        if not len(places):
            return None
        rows = run.rows[self.stream].unflatten(0, (-1, self.texts))
        if len(places) < len(rows):
            rows = rows.index_select(0, on_device(places, rows))
        return Embeddings(segment.examples[places], rows)


class EmbeddingObjective(Objective):
    """An objective that compares embeddings of texts; a task's part is the mean over its examples of the step."""

    in_batch = True
    """Whether examples are compared with each other: then every rank sees the examples that any rank has in a pass."""

    def __init__(self, name: str, sources: Mapping[str, Source], pooling: Pooling, weight: float) -> None:
        self.name = name
        self.sources = dict(sources)
        self.pooling = pooling
        self.weight = weight

    def streams(self) -> Mapping[str, TaskData]:
        """Those of its sources that are packed."""
        return {s.data.name: s.data for s in self.sources.values() if s.data is not None}

    def poolings(self) -> Mapping[str, Pooling]:
        """One pooling for all of them."""
        return dict.fromkeys(self.streams(), self.pooling)

    def examples(self, plan: Plan, step: int) -> Mapping[str, np.ndarray]:
        """The examples to compare, for the tasks of the plan."""
        chosen = {}
        for task, source in self.sources.items():
            if task in plan and len(plan[task]):
                examples = source.choose(plan[task], step)
                if examples is not None and source.data is not None:
                    chosen[source.data.name] = examples
        return chosen

    def losses(self, run: Pass) -> Mapping[str, Tensor]:
        """The share of this pass in each task's mean over the step."""
        losses = {}
        for task, source in self.sources.items():
            found, ranks = source.read(run), 1
            if self.in_batch:
                parts = [source.compared(examples) for examples in run.examples_by_rank(source.stream)]
                ranks = len(parts)
                found = _of_all_ranks(source, found, parts, run) if ranks > 1 else found
            if found is not None:
                count = len(source.compared(run.examples[source.stream]))  # of the whole step
                loss = self.weight / count * self.per_example(task, found, run).sum()
                # The ranks' losses add up: each counts its part of the value that all have, but whole gradients, since
                # those of its own rows are with it alone.
                losses[task] = loss if ranks == 1 else loss - loss.detach() * ((ranks - 1) / ranks)
        return losses

    @abstractmethod
    def per_example(self, task: str, found: Embeddings, run: Pass) -> Tensor:
        """Losses `[m]`, or fewer where an example has none."""


def _of_all_ranks(
    source: Source, found: Embeddings | None, parts: Sequence[np.ndarray], run: Pass
) -> Embeddings | None:
    """The embeddings of all ranks in the order of the step; parts: the compared examples of each rank."""
    counts = [len(examples) for examples in parts]
    if not sum(counts):
        return None
    rows = run.rows_of_all_ranks(None if found is None else found.rows, counts, source.texts)
    return Embeddings(np.concatenate(parts), rows)


def on_device(numbers: np.ndarray, like: Tensor) -> Tensor:
    """Whole numbers as a tensor on the device of `like`."""
    return torch.from_numpy(numbers).to(like.device, non_blocking=True)


def pair_source(
    name: str, task: str, context: ObjectiveContext, pooling: Pooling, used: np.ndarray
) -> Source:
    """The embeddings of the pairs of a task that are `used` (bool [n]); numbers are those of the task's examples."""
    config, data = context.task_configs[task], context.data[task]
    if data.form == "pair-rows" and config.head.pooling == pooling:
        return TaskPairs(task, used)
    texts = np.arange(2 * len(data)).reshape(-1, 2)
    own = TaskData.of_texts(
        f"{task}/{name}",
        context.tokenised[task],
        texts,
        task=task,
        labels=data.labels,
        max_length=config.max_length,
        truncate=config.truncate,
    )
    return OwnRows(own, lambda examples, step: examples[used[examples]])


@dataclass(frozen=True)
class Triples:
    """The paraphrases of a task, each with a text that is known to differ from both where there is one."""

    source: OwnRows
    """Rows anchor, positive, negative (empty where there is none; only two rows when no example has one)."""
    groups: np.ndarray
    """int64 `[p]`, the group of paraphrases that anchor and positive belong to."""
    negative_groups: np.ndarray
    """int64 `[p]`, the negative's group; -1 where there is no negative."""


def triples(
    name: str,
    task: str,
    context: ObjectiveContext,
    positive: np.ndarray,
    batch_size: int | None = None,
) -> Triples:
    """Every positive pair (bool [n]) of a task once, with a negative drawn from the pairs labelled 0 of a binary task.

    A step takes the positive pairs among the task's own examples, or `batch_size` of all of them.
    """
    config, data, kind = context.task_configs[task], context.data[task], context.tasks[task].kind
    assert data.labels is not None
    paraphrases = Paraphrases(context.tokenised[task], positive)
    differs = (data.labels == 0) & trained_on(task, context) & (kind == "binary")
    negatives = paraphrases.hard_negatives(differs, context.seed)
    pairs = paraphrases.pairs
    texts = np.stack([2 * pairs, 2 * pairs + 1, negatives], axis=1)
    own = TaskData.of_texts(
        f"{task}/{name}",
        context.tokenised[task],
        texts if (negatives >= 0).any() else texts[:, :2],
        task=task,
        max_length=config.max_length,
        truncate=config.truncate,
    )
    numbers = np.full(len(data), -1, dtype=np.int64)
    numbers[pairs] = np.arange(len(pairs))
    groups = paraphrases.groups.reshape(-1)
    return Triples(
        OwnRows(
            own,
            batches_of(own, batch_size, context.seed)
            if batch_size
            else lambda examples, step: numbers[examples][numbers[examples] >= 0],
        ),
        groups[2 * pairs],
        np.where(negatives >= 0, groups[negatives], -1),
    )


def trained_on(task: str, context: ObjectiveContext) -> np.ndarray:
    """Which examples of a task are trained on, bool [n]: all of them, or the configured fraction."""
    data, fraction = context.data[task], context.task_configs[task].train_fraction
    batches = TaskBatches(data.lengths, 1, context.seed, task, labels=data.labels, fraction=fraction)
    used = np.zeros(len(data), dtype=bool)
    used[batches.examples] = True
    return used


def batches_of(data: TaskData, size: int, seed: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """Takes batches of a stream of their own; which one depends on the seed and the step alone."""
    batches = TaskBatches(data.lengths, size, seed, data.name)
    return lambda examples, step: batches.batch(step)


def check_objective(group: str, names: Sequence[str], context: ObjectiveContext, *, pairs: bool) -> None:
    """Raise ConfigError unless the tasks of a group can have an objective that compares embeddings.

    pairs: whether it needs pairs with a label that says how alike they are.
    """
    kinds = ("binary", "similarity")
    possible = [n for n, task in context.tasks.items() if not pairs or (task.is_pair and task.kind in kinds)]
    why = "needs pairs labelled as paraphrases or with a similarity" if pairs else "not a task of this run"
    check_tasks(f"{group}.tasks", names, possible, why)
    if context.mode == "last-linear-layer":
        raise ConfigError(f"{group}.tasks: needs a trained encoder, mode last-linear-layer freezes it")


def check_batches(group: str, names: Sequence[str], context: ObjectiveContext) -> None:
    """Raise ConfigError where a task's batch is one example, which leaves an in-batch loss without negatives."""
    for name in names:
        if context.task_configs[name].batch_size < 2:
            raise ConfigError(
                f"{name}.batch_size: {group} takes its negatives from the batch; expected at least 2, found 1"
            )


def positive_pairs(
    group: str, name: str, context: ObjectiveContext, threshold: float, least: int = 2
) -> np.ndarray:
    """Which training pairs of a task are paraphrases, bool [n]; ConfigError when fewer than `least` are."""
    labels = context.data[name].labels
    assert labels is not None
    positive = are_paraphrases(context.tasks[name], labels, threshold, f"{group}.threshold")
    positive &= trained_on(name, context)
    if positive.sum() < least:
        found = f"{positive.sum()} of {len(labels)} training pairs of {name}"
        if context.tasks[name].kind == "binary":
            raise ConfigError(f"{group}.tasks: expected at least {least} paraphrases, found {found}")
        raise ConfigError(
            f"{group}.threshold: expected at least {least} pairs of a similarity of {threshold:g} or more, "
            f"found {found}; the highest similarity is {labels.max():g}"
        )
    return positive
