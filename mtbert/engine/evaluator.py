"""Scores of every task on dev and on (a sample of) train, without dropout."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from mtbert.data.dataset import TaskData
from mtbert.engine.distributed import ALONE, World
from mtbert.engine.forward import Forward
from mtbert.engine.inference import infer, labels_of
from mtbert.errors import ConfigError
from mtbert.evaluation.embedding_quality import EmbeddingQuality
from mtbert.evaluation.halves import Selection, selection_half
from mtbert.evaluation.metrics import TaskScores, aggregates, score
from mtbert.losses.task_losses import TaskLoss
from mtbert.ranges import span
from mtbert.tasks.registry import Task

MAX_RESAMPLES = 1_000_000


@dataclass
class EvaluationConfig:
    """When to evaluate, on what, and when to stop early."""

    every: Literal["epoch", "phase"] | int = "epoch"
    """Evaluate after every epoch, after every task's pass of a sequential curriculum as well (phase: shows forgetting),
    or every so many steps; the end of training is always evaluated."""
    train_examples: Literal["all"] | int = 1000
    """Training examples of each task to score: a seeded sample of this size, 0 for none, or all."""
    patience: int = 0
    """Stop after so many evaluations without a better dev score; 0 never stops early."""
    selection: Selection = "dev"
    """What chooses the best checkpoint, stops early and steers curricula: the whole of dev, on which the result is
    reported, too (optimistic); or one half of it, the same for every seed and run, and the result is of the other."""
    resamples: int = 1000
    """Bootstrap resamples of the reported intervals."""

    def __post_init__(self) -> None:
        if isinstance(self.every, int) and self.every < 1:
            raise ConfigError(
                f"evaluation.every: expected epoch, phase or at least 1 step, found {self.every}"
            )
        if isinstance(self.train_examples, int) and self.train_examples < 0:
            raise ConfigError(f"evaluation.train_examples: expected at least 0, found {self.train_examples}")
        if self.patience < 0:
            raise ConfigError(f"evaluation.patience: expected at least 0, found {self.patience}")
        if not 1 <= self.resamples <= MAX_RESAMPLES:
            raise ConfigError(f"evaluation.resamples: expected 1 to {MAX_RESAMPLES}, found {self.resamples}")


@dataclass(frozen=True)
class Evaluation:
    """Scores and mean losses by task on both splits; `dev` is the half that chooses where dev is halved."""

    train: dict[str, TaskScores]
    dev: dict[str, TaskScores]
    train_loss: dict[str, float]
    dev_loss: dict[str, float]
    embedding: EmbeddingQuality | None = None

    @property
    def score(self) -> float:
        """The number that checkpoints are chosen by (see `metrics.selection_score`)."""
        value = aggregates(self.dev)["score"]
        assert value is not None
        return value

    def to_json(self) -> dict[str, Any]:
        """The evaluation's part of a line of metrics.jsonl."""
        return {
            "train": {task: s.to_json() for task, s in self.train.items()},
            "dev": {task: s.to_json() for task, s in self.dev.items()},
            "train_loss": self.train_loss,
            "dev_loss": self.dev_loss,
            **({} if self.embedding is None else {"embedding": self.embedding.to_json()}),
            **aggregates(self.dev),
        }


def seeded_sample(size: int, wanted: Literal["all"] | int, seed: int, name: str) -> np.ndarray:
    """The same `wanted` of `size` indices for a seed and a task, in ascending order."""
    if wanted == "all" or wanted >= size:
        return np.arange(size)
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return np.sort(generator.choice(size, wanted, replace=False))


def dev_sample(data: TaskData, selection: Selection) -> np.ndarray:
    """The indices of the dev examples that checkpoints are chosen on, ascending. Raises ConfigError and DataError."""
    if selection == "dev":
        return np.arange(len(data))
    if len(data) < 2:
        raise ConfigError(
            f"evaluation.selection: half needs at least 2 dev examples of {data.name}, found {len(data)};"
            " possible: dev"
        )
    return np.flatnonzero(selection_half(data.ids, labels_of(data)))


class Evaluator:
    """Holds what an evaluation needs; `forward` is the trained model's."""

    def __init__(
        self,
        forward: Forward,
        tasks: Mapping[str, Task],
        data: Mapping[str, Mapping[str, TaskData]],
        losses: Mapping[str, TaskLoss],
        config: EvaluationConfig,
        *,
        max_tokens: int,
        seed: int,
        trained_on: Mapping[str, np.ndarray] | None = None,
        quality: Callable[[], EmbeddingQuality] | None = None,
        world: World = ALONE,
    ) -> None:
        """trained_on: the training examples that a task is trained on, where these are not all of its table.

        quality: measures the sentence embeddings, where the run asks for it. world: its ranks share the work, and all
        get the same scores.
        """
        used = {name: np.arange(len(data[name]["train"])) for name in tasks} | dict(trained_on or {})
        self.forward = forward
        self.tasks = dict(tasks)
        self.data = data
        self.losses = losses
        self.max_tokens = max_tokens
        self.quality = quality
        self.world = world
        self.examples = {
            name: {
                "train": used[name][seeded_sample(len(used[name]), config.train_examples, seed, name)],
                "dev": dev_sample(data[name]["dev"], config.selection),
            }
            for name in tasks
        }

    def evaluate(self) -> Evaluation:
        """Score dev, or the half of it that chooses, and the sample of train."""
        scores: dict[str, dict[str, TaskScores]] = {"train": {}, "dev": {}}
        losses: dict[str, dict[str, float]] = {"train": {}, "dev": {}}
        for name, task in self.tasks.items():
            for split, examples in self.examples[name].items():
                if split == "train" and not len(examples):
                    continue
                data = self.data[name][split]
                with span("evaluation", name, split):
                    outputs = infer(
                        self.forward, data, max_tokens=self.max_tokens, examples=examples, world=self.world
                    )
                labels = labels_of(data)[examples]
                scores[split][name] = score(task, labels, outputs)
                losses[split][name] = self._mean_loss(name, outputs, labels)
        quality = None if self.quality is None else self.quality()
        return Evaluation(scores["train"], scores["dev"], losses["train"], losses["dev"], quality)

    def _mean_loss(self, name: str, outputs: np.ndarray, labels: np.ndarray) -> float:
        loss = self.losses[name]
        device = torch.device("cpu") if loss.class_weights is None else loss.class_weights.device
        values = loss.per_example(
            torch.from_numpy(outputs).to(device), torch.from_numpy(np.asarray(labels)).to(device)
        )
        return float(values.mean())
