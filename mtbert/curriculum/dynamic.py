"""The curriculum that follows the scores on dev."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mtbert.curriculum.base import Plan
from mtbert.curriculum.turns import Parallel


class Dynamic(Parallel):
    """A step holds rows of every task, and the lower a task's score on dev, the more rows are its.

    De La Cruz et al. 2024, section 4.2: the batch of each task is "dynamically adjusted based on the model's
    performance, ensuring that more challenging tasks receive more attention". They give no formula; this is ours. Let
    b_k be the batch size of task k, B their sum, s_k the task's score at the last evaluation (accuracy or Pearson's
    correlation, cut to 0..1), and d_k = (b_k - 1) (1 - s_k). Then

        n_k = 1 + (B - K) d_k / (d_1 + ... + d_K)

    rows of task k are in a step, rounded to whole numbers of sum B by largest remainders. Every task keeps a row; equal
    scores give n_k = b_k, and that is also what holds before the first evaluation. K, B and the sum run over the tasks
    that have started. A task's loss stays the mean over its rows: its weight is the same, but it sees more of its
    examples. At the end of a cycle a task may give fewer rows, so that a cycle holds every example once.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.scores: dict[str, float] = {}

    def observe(self, dev_scores: Mapping[str, float]) -> None:
        """Share out the rows anew from the next step on."""
        self.scores = {task: float(dev_scores[task]) for task in self.batches}

    def rows(self, epoch: int) -> dict[str, int]:
        """Rows of each task in a step of an epoch."""
        sizes = {task: self.batches[task].batch_size for task in self.started(epoch)}
        ease = {task: min(max(self.scores.get(task, 0.0), 0.0), 1.0) for task in sizes}
        difficulty = [(size - 1) * (1.0 - ease[task]) for task, size in sizes.items()]
        if not sum(difficulty):
            return sizes
        shares = _whole_shares(difficulty, sum(sizes.values()) - len(sizes))
        return {task: 1 + share for task, share in zip(sizes, shares, strict=True)}

    def next(self) -> Plan:
        """The next step's examples."""
        plan = {}
        for task, count in self.rows(self.position(self.step)[0]).items():
            plan[task] = self.batches[task].rows(self.taken[task], count)
            self.taken[task] += len(plan[task])
        self.step += 1
        return plan

    def state(self) -> dict[str, Any]:
        """Steps, the rows taken of each task, and the last scores."""
        return super().state() | {"scores": dict(self.scores)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of `state()`."""
        super().restore(state)
        self.scores = {task: float(score) for task, score in state["scores"].items()}


def _whole_shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to `weights` whose sum is `total`: the largest remainders are rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: shares[place] - exact[place])
    for place in by_remainder[: total - sum(shares)]:
        shares[place] += 1
    return shares
