"""Curricula that draw the task of each step, by the tasks' sizes."""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np

from mtbert.curriculum.base import Curriculum
from mtbert.data.batching import counter_generator


class Drawn(Curriculum):
    """The task of each step is drawn with probability proportional to size ** alpha, among those that have started.

    size: the task's training examples. An epoch has as many steps as that of Sequential.
    """

    own_passes = True

    @abstractmethod
    def alpha(self, epoch: int) -> float:
        """The exponent in an epoch, from 0."""

    def tasks_of(self, epoch: int, place: int) -> list[str]:
        """One task: a function of the run's seed, the epoch and the place."""
        tasks = self.started(epoch)
        sums = np.cumsum([self.sizes[task] ** self.alpha(epoch) for task in tasks])
        word = int(counter_generator(self.seed, "curriculum", epoch, place).random_raw())
        share = (word >> 11) * 2.0**-53  # in [0, 1)
        return [tasks[int(np.searchsorted(sums[:-1], share * sums[-1], side="right"))]]


class Proportional(Drawn):
    """Drawn in proportion to the sizes."""

    def alpha(self, epoch: int) -> float:
        """1."""
        return 1.0


class SquareRoot(Drawn):
    """Drawn in proportion to the square roots of the sizes."""

    def alpha(self, epoch: int) -> float:
        """0.5."""
        return 0.5


class Annealed(Drawn):
    """Drawn by sizes at first, nearly alike at the end: Stickland and Murray 2019, BERT and PALs."""

    def alpha(self, epoch: int) -> float:
        """1 - 0.8 (e - 1) / (E - 1) in epoch e = 1, ..., E; 1 where there is one epoch only."""
        last = math.ceil(self.epochs) - 1
        return 1.0 if last < 1 else 1.0 - 0.8 * min(epoch, last) / last
