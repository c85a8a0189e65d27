"""What can be set of a curriculum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mtbert.errors import ConfigError

Mixing = Literal["parallel", "round-robin", "sequential", "proportional", "sqrt", "annealed", "dynamic"]


@dataclass
class CurriculumConfig:
    """How the tasks are mixed."""

    mixing: Mixing = "parallel"
    """parallel: every step holds a batch of every task; round-robin: a step after each task's batch; sequential: in
    every epoch a pass over one task after the other; proportional, sqrt, annealed: a step holds a batch of one task,
    drawn with probability size ** alpha, where alpha is 1, 0.5, or falls from 1 to 0.2 over the epochs (Stickland and
    Murray 2019); dynamic: parallel, with more rows for tasks of low dev scores (De La Cruz et al. 2024)."""
    epoch_length: Literal["smallest", "largest"] | int = "largest"
    """Batches of each task in an epoch: as many as the smallest or the largest task has (the other tasks go on through
    their own cycles, so that nothing stays unseen), or a number. sequential and the drawn ones: `largest` cuts
    nothing, every task has a whole pass of its own (on average, where tasks are drawn)."""
    order: list[str] = field(default_factory=list)
    """All tasks, in the order of their turns and of their rows; by default the order of `tasks`."""
    start: dict[str, int] = field(default_factory=dict)
    """Epochs that are over before a task joins, by task; 0 for those not named."""

    def __post_init__(self) -> None:
        if isinstance(self.epoch_length, int) and self.epoch_length < 1:
            raise ConfigError(f"curriculum.epoch_length: expected at least 1, found {self.epoch_length}")
        for task, epoch in self.start.items():
            if epoch < 0:
                raise ConfigError(f"curriculum.start: expected at least 0 epochs, found {epoch} for {task}")
