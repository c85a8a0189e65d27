"""Curricula whose schedule is fixed: every task in every step, or one task after the other."""

from __future__ import annotations

from mtbert.curriculum.base import Curriculum


class Parallel(Curriculum):
    """One step holds a batch of every task; its loss is the weighted sum of the tasks' means."""

    joins_tasks = True

    def epoch_steps(self, epoch: int) -> int:
        """A step for each batch of the task that sets the epoch's length, whether it has started or not."""
        return max(self.passes.values())

    def tasks_of(self, epoch: int, place: int) -> list[str]:
        """All that have started."""
        return self.started(epoch)


class RoundRobin(Curriculum):
    """The tasks take turns: a step after each task's batch, in their order."""

    def tasks_of(self, epoch: int, place: int) -> list[str]:
        """The one whose turn it is."""
        tasks = self.started(epoch)
        return [tasks[place % len(tasks)]]


class Sequential(Curriculum):
    """In every epoch a pass over each task, one after the other (Peng, Yuan and Wang 2024, section 5.7)."""

    own_passes = True

    def tasks_of(self, epoch: int, place: int) -> list[str]:
        """The one in whose pass the step lies."""
        for task in self.started(epoch):
            if place < self.passes[task]:
                return [task]
            place -= self.passes[task]
        raise ValueError(f"epoch {epoch} has no step {place}")

    def finished_task(self, step: int) -> str | None:
        """The task whose pass ends with step number `step`; None for a single task, which never changes."""
        if len(self.batches) < 2:
            return None
        task = self.tasks_of(*self.position(step - 1))[0]
        over = self.ends_epoch(step) or self.tasks_of(*self.position(step)) != [task]
        return task if over else None
