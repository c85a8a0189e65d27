"""How long a row trains and how much of a table it reads: as the paper has it, and as it was run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtbert.optim.adamw import OptimizerConfig


@dataclass(frozen=True)
class Schedule:
    """What settings say of a training's length."""

    epochs: float
    lr: float
    """Peak learning rate of the encoder."""
    mixing: str
    epoch_length: str | int
    start: Mapping[str, int]
    """Epochs that are over before a task joins, by task."""
    batch_sizes: Mapping[str, int]
    trained: frozenset[str]
    """Tasks with a loss of their own or with an objective; the others are only evaluated."""
    first_task: str | None
    """The task that is trained alone before all others, if any, and how many passes."""
    first_passes: float

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Schedule:
        """From a preset, or from a run's complete configuration."""
        curriculum = settings.get("curriculum") or {}
        pretraining = settings.get("pretraining") or {}
        tasks = {name: settings[name] for name in settings["tasks"]}
        groups = [group for group in settings.values() if isinstance(group, Mapping)]
        return cls(
            epochs=float(settings["epochs"]),
            lr=float((settings.get("optim") or {}).get("lr", OptimizerConfig.lr)),
            mixing=curriculum.get("mixing", "parallel"),
            epoch_length=curriculum.get("epoch_length", "largest"),
            start={task: epoch for task, epoch in (curriculum.get("start") or {}).items() if epoch},
            batch_sizes={name: int(task["batch_size"]) for name, task in tasks.items()},
            trained=frozenset(
                name
                for name, task in tasks.items()
                if (task.get("loss") or {}).get("weight", 1.0)
                or any(name in (group.get("tasks") or ()) for group in groups)
            ),
            first_task=pretraining.get("task"),
            first_passes=float(pretraining.get("task_epochs", 1.0)) if pretraining.get("task") else 0.0,
        )

    def distinct(self, task: str, sizes: Mapping[str, int]) -> int:
        """Different training rows of a task that training sees; sizes: the tables' rows, by task.

        Batches walk through the table and repeat a row only when all others had their turn; a first training on the
        task alone begins with the same rows as the training after it.
        """
        size = sizes[task]
        first = self.first_passes * size if self.first_task == task else 0.0
        if task not in self.trained:
            return min(size, round(first))
        batches = {name: math.ceil(sizes[name] / batch) for name, batch in self.batch_sizes.items()}
        if isinstance(self.epoch_length, int):
            length = self.epoch_length
        elif self.epoch_length == "largest" and self.mixing == "sequential":
            length = batches[task]
        else:
            length = (min if self.epoch_length == "smallest" else max)(batches.values())
        drawn = (self.epochs - self.start.get(task, 0)) * length * self.batch_sizes[task]
        return min(size, round(max(first, drawn)))

    def text(self, paper: Schedule) -> str:
        """The epochs and the paper's, and everything else that was shortened with them."""
        parts = [f"{_number(self.epochs)} of {_number(paper.epochs)}"]
        if self.epoch_length != paper.epoch_length:
            parts.append(f"each cut to {self.epoch_length} batches a task")
        if paper.first_task is not None:
            passes = f"{_number(self.first_passes)} of {_number(paper.first_passes)} passes"
            parts.append(f"before them {passes} over {paper.first_task} alone")
        for task, epoch in paper.start.items():
            ours = self.start.get(task, 0)
            if ours != epoch:
                when = f"joins after epoch {ours}" if ours else "takes part from the start"
                parts.append(f"{task} {when} (paper: joins after epoch {epoch})")
        if not math.isclose(self.lr, paper.lr, rel_tol=1e-6):
            parts.append(f"learning rate {self.lr:.3g} (paper: {paper.lr:.3g})")
        return ", ".join(parts)

    def changed(self, paper: Schedule) -> str | None:
        """How it was made shorter, longer or faster than the paper's, in words; None where it was not."""
        ours, theirs = (
            (s.epochs, s.epoch_length, dict(s.start), s.first_task, s.first_passes) for s in (self, paper)
        )
        if ours == theirs:
            same_rate = math.isclose(self.lr, paper.lr, rel_tol=1e-6)
            return None if same_rate else f"changed (epochs: {self.text(paper)})"
        word = "lengthened" if self.epochs > paper.epochs else "shortened"
        return f"{word} (epochs: {self.text(paper)})"

    def lost_starts(self, paper: Schedule) -> list[str]:
        """The tasks that the paper lets join later, and that take part from the start here."""
        return [task for task in paper.start if task not in self.start]


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
