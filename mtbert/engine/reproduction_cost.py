"""What a configuration will cost, without training it: steps, tokens, and from a measured speed the time."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mtbert.data.dataset import TaskData
from mtbert.data.tables import Table
from mtbert.data.tokenisation import Tokeniser
from mtbert.engine.build import curriculum_of, task_batches, task_data, tasks_of, token_cache
from mtbert.model.pretrained import resolve
from mtbert.tasks.loading import load_tables
from mtbert.tasks.registry import get_task

if TYPE_CHECKING:
    from mtbert.config import TrainConfig

START_SECONDS = 10.0
"""From the process's start to the first step, and the report at the end."""
STEP_TOKENS = {"full": 250, "bitfit": 50, "lora": 50}
"""What every step takes whatever its size, in tokens, by mode."""
# By rule of thumb, measured with MiniLM on a CPU.
_FORWARD = 1 / 3  # of the work of training on the same tokens
_LORA = 0.7  # of the work of full fine-tuning
_SURGERY, _LORA_SURGERY = 1.05, 1.01
_SAMPLED_STEPS = 2000


@dataclass(frozen=True)
class Cost:
    """Steps of a run, the tokens that it trains on, and its work."""

    steps: int
    steps_per_epoch: int
    tokens: float
    """Of its steps' examples, each counted once, whatever a method does with it. 0 over a frozen encoder, whose
    features are computed once."""
    training: float
    """Work, as tokens that plain fine-tuning would train on in the same time."""
    evaluation: float
    """Likewise."""

    def seconds(self, tokens_per_second: float) -> float:
        """The time at a speed of plain fine-tuning."""
        return START_SECONDS + (self.training + self.evaluation) / tokens_per_second


class CostModel:
    """Costs on the tables of one source with one encoder's tokeniser."""

    def __init__(self, data: str, pretrained: str) -> None:
        self._source = data
        self._tokeniser = Tokeniser.from_folder(resolve(pretrained))
        self._tables: dict[str, Mapping[str, Table]] = {}
        self._data: dict[tuple[object, ...], dict[str, TaskData]] = {}

    def cost(self, config: TrainConfig) -> Cost:
        """Steps and tokens of a run. A step's objectives and surgery count by rule of thumb."""
        data = {name: self._splits(config, name) for name in config.tasks}
        batches = task_batches(config, data)
        curriculum = curriculum_of(config, batches)
        steps = curriculum.total_steps
        sampled = np.linspace(0, steps - 1, min(steps, _SAMPLED_STEPS)).astype(int)
        turns = Counter(
            task for step in sampled for task in curriculum.tasks_of(*curriculum.position(int(step)))
        )
        means = {name: float(splits["train"].lengths.mean()) for name, splits in data.items()}
        tokens = training = 0.0
        for name, count in turns.items():
            own = config.task[name].batch_size * means[name] * count * steps / len(sampled)
            tokens += own
            training += own * _passes(config, name)
        if config.surgery.needs_task_gradients:
            training *= _LORA_SURGERY if config.mode == "lora" else _SURGERY
        training = (
            training * (_LORA if config.mode == "lora" else 1) + STEP_TOKENS.get(config.mode, 0) * steps
        )
        sums = {name: {s: int(d.lengths.sum()) for s, d in splits.items()} for name, splits in data.items()}
        evaluation = self._evaluation(config, sums, means, steps / curriculum.steps_per_epoch)
        if config.mode == "last-linear-layer":
            # The frozen encoder reads every table once; steps and evaluations read its features.
            tokens, training, evaluation = (
                0.0,
                0.0,
                float(sum(sum(splits.values()) for splits in sums.values())),
            )
        training += config.pretraining.mlm_epochs * sum(splits["train"] for splits in sums.values())
        if config.pretraining.task is not None:
            table = self._splits(config, config.pretraining.task)["train"]
            training += config.pretraining.task_epochs * float(table.lengths.sum())
        return Cost(steps, curriculum.steps_per_epoch, tokens, training, _FORWARD * evaluation)

    def _splits(self, config: TrainConfig, name: str) -> dict[str, TaskData]:
        task, settings = get_task(name), config.task[name]
        key = (name, settings.head.pair == "cross-encoder", settings.max_length, settings.truncate)
        if key not in self._data:
            if name not in self._tables:
                self._tables |= load_tables(self._source, [task])
            cache = token_cache(config)
            self._data[key] = {
                split: task_data(task, settings, table, self._tokeniser, cache)
                for split, table in self._tables[name].items()
            }
        return self._data[key]

    @staticmethod
    def _evaluation(
        config: TrainConfig, sums: Mapping[str, Mapping[str, int]], means: Mapping[str, float], epochs: float
    ) -> float:
        """Tokens that evaluations after every epoch and the predictions at the end read."""
        dev = sum(splits["dev"] for splits in sums.values())
        examples = config.evaluation.train_examples
        sample = sum(
            splits["train"] if examples == "all" else min(splits["train"], examples * means[name])
            for name, splits in sums.items()
        )
        evaluations = math.ceil(epochs) * (len(config.tasks) if config.evaluation.every == "phase" else 1)
        return evaluations * (dev + sample) + dev + sum(s.get("test", 0) for s in sums.values())


def _passes(config: TrainConfig, task: str) -> float:
    """How often a task's rows go through the encoder in a step, as plain training passes."""
    passes = 1.0
    if task in config.simcse.tasks:
        passes += 2
    if task in config.smart.tasks:
        passes += 2 * config.smart.steps
    if task in config.bregman.tasks:
        passes += _FORWARD
    siamese = tasks_of(config)[task].is_pair and config.task[task].head.pair != "cross-encoder"
    for group in (config.mnrl, config.cosine_embedding, config.triplet):
        if task in group.tasks and not siamese:
            passes += 1
    return passes


def shortened(
    config: TrainConfig, scale: float, max_steps: int | None = None, cost: Cost | None = None
) -> TrainConfig:
    """The configuration with everything that is counted in epochs times `scale`, and at most `max_steps` steps.

    cost: of the configuration as it is; max_steps needs it. A sequential curriculum keeps whole epochs, at least one,
    so that every task has its phase: where one epoch has more than `max_steps` steps, its phases are cut alike.
    """
    epochs, length = config.epochs * scale, config.curriculum.epoch_length
    if max_steps is not None and cost is not None:
        epochs = min(epochs, max_steps / cost.steps_per_epoch)
    if config.curriculum.mixing == "sequential":
        if epochs < 1 and max_steps is not None:
            length = max(1, max_steps // len(config.tasks))
        epochs = max(1.0, float(int(epochs + 1e-9)))
    share = epochs / config.epochs
    last = math.ceil(epochs) - 1
    start = {task: min(max(1, round(epoch * share)), last) for task, epoch in config.curriculum.start.items()}
    pretraining = config.pretraining
    if pretraining.active:
        pretraining = dataclasses.replace(
            pretraining,
            mlm_epochs=pretraining.mlm_epochs * share,
            task_epochs=pretraining.task_epochs * share,
        )
    curriculum = dataclasses.replace(config.curriculum, start=start, epoch_length=length)
    return dataclasses.replace(config, epochs=epochs, curriculum=curriculum, pretraining=pretraining)


def faster(config: TrainConfig, factor: float) -> TrainConfig:
    """The configuration with its learning rates times `factor`; heads over a frozen encoder keep theirs."""
    if config.mode == "last-linear-layer":
        return config
    optim = config.optim
    head_lr = None if optim.head_lr is None else optim.head_lr * factor
    pretraining = config.pretraining
    if pretraining.mlm_epochs:
        pretraining = dataclasses.replace(pretraining, mlm_lr=pretraining.mlm_lr * factor)
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(optim, lr=optim.lr * factor, head_lr=head_lr),
        pretraining=pretraining,
    )
