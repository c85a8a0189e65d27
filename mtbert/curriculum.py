"""Which examples come next: the tasks' batches of every step, with a state that a checkpoint keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mtbert.data.batching import TaskBatches
from mtbert.errors import ConfigError

Plan = dict[str, np.ndarray]
"""One step: the indices of the examples of each of its tasks, int64."""


@dataclass
class CurriculumConfig:
    """How the tasks are mixed."""

    mixing: Literal["parallel", "round-robin"] = "parallel"
    """parallel: every step holds a batch of every task; round-robin: a step after each task's batch."""
    epoch_length: Literal["smallest", "largest"] | int = "largest"
    """Batches of each task in an epoch: as many as the smallest or the largest task has (the other tasks
    go on through their own cycles, so that nothing stays unseen), or a number."""

    def __post_init__(self) -> None:
        if isinstance(self.epoch_length, int) and self.epoch_length < 1:
            raise ConfigError(f"curriculum.epoch_length: expected at least 1, found {self.epoch_length}")


class Curriculum(ABC):
    """Yields plans. Every task walks through its own cycles of batches; each cycle holds every example once."""

    def __init__(self, batches: Mapping[str, TaskBatches], config: CurriculumConfig) -> None:
        if not batches:
            raise ConfigError("tasks: expected at least one task, found none")
        self.batches = dict(batches)
        self.cursors = dict.fromkeys(self.batches, 0)
        lengths = [len(b) for b in self.batches.values()]
        length = config.epoch_length
        self.batches_per_epoch = (
            length if isinstance(length, int) else min(lengths) if length == "smallest" else max(lengths)
        )

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""

    @abstractmethod
    def next(self) -> Plan:
        """The next step's examples; moves the cursors on."""

    def _take(self, task: str) -> np.ndarray:
        batch = self.batches[task].batch(self.cursors[task])
        self.cursors[task] += 1
        return batch

    def state(self) -> dict[str, int]:
        """Batches taken of each task so far (JSON-able)."""
        return dict(self.cursors)

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from a state of `state()`."""
        if set(state) != set(self.cursors):
            raise ConfigError(f"tasks: the checkpoint holds {sorted(state)}, the run {sorted(self.cursors)}")
        self.cursors = {task: int(state[task]) for task in self.cursors}


class Parallel(Curriculum):
    """One step holds a batch of every task; its loss is the weighted sum of the tasks' means."""

    @property
    def steps_per_epoch(self) -> int:
        """One step for each batch of the task that sets the epoch's length."""
        return self.batches_per_epoch

    def next(self) -> Plan:
        """A batch of every task."""
        return {task: self._take(task) for task in self.batches}


class RoundRobin(Curriculum):
    """The tasks take turns: a step after each task's batch, in the order of the configuration."""

    @property
    def steps_per_epoch(self) -> int:
        """Every task has `batches_per_epoch` steps."""
        return self.batches_per_epoch * len(self.batches)

    def next(self) -> Plan:
        """A batch of the task that has had the fewest turns (the first of them in order)."""
        task = min(self.cursors, key=self.cursors.__getitem__)
        return {task: self._take(task)}


def build_curriculum(batches: Mapping[str, TaskBatches], config: CurriculumConfig) -> Curriculum:
    """The curriculum of `config.mixing`."""
    kinds: dict[str, type[Curriculum]] = {"parallel": Parallel, "round-robin": RoundRobin}
    return kinds[config.mixing](batches, config)
