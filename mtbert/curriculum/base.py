"""The frame of every curriculum: epochs and their steps, the tasks that take part in them, and the state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtbert.curriculum.config import CurriculumConfig
from mtbert.data.batching import TaskBatches
from mtbert.errors import ConfigError

Plan = dict[str, np.ndarray]
"""One step: the indices of the examples of each of its tasks, int64."""


class Curriculum(ABC):
    """Yields plans. Every task walks through its own cycles of batches, wherever epochs begin and end.

    A step's tasks are a function of its epoch and its place in it; a task takes part in the epochs from its start on.
    Epochs before the last start may have fewer steps than the others.
    """

    joins_tasks = False
    """Whether a step may hold rows of several tasks."""
    own_passes = False
    """Whether `epoch_length: largest` gives each task its own number of batches."""

    def __init__(
        self,
        batches: Mapping[str, TaskBatches],
        config: CurriculumConfig,
        *,
        sizes: Mapping[str, int],
        seed: int,
        epochs: float,
    ) -> None:
        """sizes: training examples of each task; epochs: of the whole training."""
        if not batches:
            raise ConfigError("tasks: expected at least one task, found none")
        self.batches = {task: batches[task] for task in _order(config.order, list(batches))}
        self.start = _starts(config.start, list(self.batches), epochs)
        self.sizes = {task: sizes[task] for task in self.batches}
        self.seed = seed
        self.epochs = epochs
        self.passes = self._passes(config.epoch_length)
        self.step = 0
        self.taken = dict.fromkeys(self.batches, 0)

    def _passes(self, length: str | int) -> dict[str, int]:
        """Batches of each task in an epoch."""
        own = {task: len(batches) for task, batches in self.batches.items()}
        if length == "largest" and self.own_passes:
            return own
        if isinstance(length, str):
            length = min(own.values()) if length == "smallest" else max(own.values())
        return dict.fromkeys(own, length)

    def epoch_steps(self, epoch: int) -> int:
        """Optimizer steps of an epoch, from 0: those of the passes of all tasks that have started."""
        return sum(self.passes[task] for task in self.started(epoch))

    @abstractmethod
    def tasks_of(self, epoch: int, place: int) -> list[str]:
        """The tasks of step `place` of an epoch, both from 0."""

    def next(self) -> Plan:
        """The next step's examples."""
        plan = {task: self._take(task) for task in self.tasks_of(*self.position(self.step))}
        self.step += 1
        return plan

    def _take(self, task: str) -> np.ndarray:
        batch = self.batches[task].batch(self.taken[task])
        self.taken[task] += 1
        return batch

    def started(self, epoch: int) -> list[str]:
        """The tasks that take part in an epoch, in order."""
        return [task for task in self.batches if self.start[task] <= epoch]

    # ---- steps and epochs ----

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch in which all tasks take part."""
        return self.epoch_steps(max(self.start.values()))

    def position(self, step: int) -> tuple[int, int]:
        """The epoch in which a step lies, and its place there."""
        settled = max(self.start.values())
        for epoch in range(settled):
            if step < self.epoch_steps(epoch):
                return epoch, step
            step -= self.epoch_steps(epoch)
        epoch, place = divmod(step, self.steps_per_epoch)
        return settled + epoch, place

    def epoch_of(self, step: int) -> float:
        """Epochs that are over before a step, with their fraction."""
        epoch, place = self.position(step)
        return epoch + place / self.epoch_steps(epoch)

    def ends_epoch(self, step: int) -> bool:
        """Whether `step` steps make up whole epochs."""
        return self.position(step)[1] == 0

    def finished_task(self, step: int) -> str | None:
        """The task whose pass ends with step number `step` (from 1), where tasks have passes of their own."""
        return None

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training; a fraction of an epoch is rounded to steps, at least 1 in all."""
        whole = int(self.epochs)
        last = (self.epochs - whole) * self.epoch_steps(whole)
        return max(1, round(sum(self.epoch_steps(epoch) for epoch in range(whole)) + last))

    # ---- what changes in the course of training ----

    @property
    def follows_scores(self) -> bool:
        """Whether evaluations change which examples come next."""
        return type(self).observe is not Curriculum.observe

    def observe(self, dev_scores: Mapping[str, float]) -> None:  # noqa: B027
        """Take note of an evaluation: the headline score of every task on dev. Most curricula do not."""

    def state(self) -> dict[str, Any]:
        """Where the curriculum stands (JSON-able): steps, and batches taken of each task."""
        return {"step": self.step, "taken": dict(self.taken)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of `state()`."""
        taken = state["taken"]
        if set(taken) != set(self.taken):
            raise ConfigError(f"tasks: the checkpoint holds {sorted(taken)}, the run {sorted(self.taken)}")
        self.step = int(state["step"])
        self.taken = {task: int(taken[task]) for task in self.taken}


def _order(order: Sequence[str], tasks: list[str]) -> list[str]:
    _check_known("curriculum.order", order, tasks)
    if order and sorted(order) != sorted(tasks):
        raise ConfigError(
            f"curriculum.order: expected every task of this run once ({', '.join(tasks)}), found {', '.join(order)}"
        )
    return list(order) or tasks


def _starts(start: Mapping[str, int], tasks: list[str], epochs: float) -> dict[str, int]:
    _check_known("curriculum.start", list(start), tasks)
    for task, epoch in start.items():
        if epoch >= epochs:
            last = math.ceil(epochs) - 1
            raise ConfigError(
                f"curriculum.start: {task} would join after {epoch} epochs and never be trained, because training has"
                f" {epochs:g}; possible: {f'0 to {last}' if last else 0}"
            )
    starts = {task: start.get(task, 0) for task in tasks}
    if min(starts.values()) > 0:
        raise ConfigError(
            f"curriculum.start: no task takes part in the first epoch; give one of {', '.join(tasks)} a start of 0"
        )
    return starts


def _check_known(name: str, given: Sequence[str], tasks: list[str]) -> None:
    for task in given:
        if task not in tasks:
            raise ConfigError(f"{name}: {task!r} is not a task of this run; possible: {', '.join(tasks)}")
