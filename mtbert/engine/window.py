"""What a line of metrics.jsonl sums up: the steps since the last line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mtbert.engine.step_result import StepResult


@dataclass
class Window:
    """What has been summed since the last line of metrics.jsonl."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    objective_sums: dict[str, float] = field(default_factory=dict)
    objective_counts: dict[str, int] = field(default_factory=dict)
    weight_sums: dict[str, float] = field(default_factory=dict)
    """Of the learned weights of the tasks' losses, which every step has."""
    gradients: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Of the gradients' cosines, norms and alterations: sum and count by task or pair of tasks."""
    gradient_steps: int = 0
    total: float = 0.0
    grad_norm: float = 0.0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    input_wait_seconds: float = 0.0
    """The part of `seconds` in which the loop waited for the input of a step."""
    skipped: int = 0
    """Steps that a loss scale overflowed. The sums are those of the other steps."""
    loss_scale: float | None = None
    """Of the last step; None where losses are not scaled."""

    def add(self, result: StepResult) -> None:
        """Count one more step; reads its figures from the device."""
        if result.scaling is not None:
            self.loss_scale = float(result.scaling.scale)
            if not result.check():
                self.skipped += 1
                return
        for task, loss in result.losses.items():
            self.sums[task] = self.sums.get(task, 0.0) + float(loss)
            self.counts[task] = self.counts.get(task, 0) + 1
        for name, loss in result.objectives.items():
            self.objective_sums[name] = self.objective_sums.get(name, 0.0) + float(loss)
            self.objective_counts[name] = self.objective_counts.get(name, 0) + 1
        for task, weight in result.weights.items():
            self.weight_sums[task] = self.weight_sums.get(task, 0.0) + float(weight)
        if result.gradients is not None:
            self.gradient_steps += 1
            for kind, values in result.gradients.to_json().items():
                sums = self.gradients.setdefault(kind, {})
                for name, value in values.items():
                    before = sums.get(name, [0.0, 0])
                    sums[name] = [before[0] + value, before[1] + 1]
        self.total += float(result.total)
        self.grad_norm += float(result.grad_norm)
        self.steps += 1

    def to_json(self) -> dict[str, Any]:
        """Means of the losses, weights, norms and cosines; sums of tokens and seconds. Empty parts are left out.

        Under a loss scale also the scale and how many steps were skipped, which the means leave out.
        """
        line: dict[str, Any] = {"loss": _means(self.sums, self.counts)}
        if self.objective_sums:
            line["objective"] = _means(self.objective_sums, self.objective_counts)
        if self.weight_sums:
            line["weights"] = {task: total / self.steps for task, total in self.weight_sums.items()}
        if self.gradients:
            line["gradients"] = {
                kind: {name: total / count for name, (total, count) in sums.items()}
                for kind, sums in self.gradients.items()
            } | {"steps": self.gradient_steps}
        if self.steps:
            line |= {"total_loss": self.total / self.steps, "grad_norm": self.grad_norm / self.steps}
        if self.loss_scale is not None:
            line |= {"loss_scale": self.loss_scale, "skipped": self.skipped}
        return line | {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "input_wait_seconds": self.input_wait_seconds,
        }


def _means(sums: dict[str, float], counts: dict[str, int]) -> dict[str, float]:
    return {name: value / counts[name] for name, value in sums.items()}
