"""A run's metrics.jsonl: losses by step, scores by evaluation, times by epoch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtbert.errors import DataError

KINDS = ("step", "evaluation", "epoch")
Series = tuple[list[float], list[float]]


def epoch_text(epoch: float) -> str:
    """A number of epochs with at most two decimals: `3`, `2.37`."""
    return f"{epoch:.2f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class EpochTime:
    """One epoch: the epochs done at its end (a fraction where training stopped within one), the step there,
    its training seconds and its useful tokens."""

    epoch: float
    step: int
    seconds: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Useful tokens a second; 0 where no time was measured."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class History:
    """The lines of metrics.jsonl by kind, each in the order of the file."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)

    def losses(self, task: str) -> Series:
        """Training loss of a task: steps and values."""
        return _series(self.steps, "loss", task)

    def dev_losses(self, task: str) -> Series:
        """Dev loss of a task: steps and values."""
        return _series(self.evaluations, "dev_loss", task)

    def scores(self, split: str, task: str, metric: str) -> Series:
        """One metric of a task on `train` or `dev`: steps and values."""
        return _series(self.evaluations, split, task, metric)

    def class_f1(self, split: str, task: str) -> dict[str, Series]:
        """The F1 of every class of a task on `train` or `dev`, by the class's name: steps and values."""
        curves: dict[str, Series] = {}
        for line in self.evaluations:
            for row in ((line.get(split) or {}).get(task) or {}).get("classes", ()):
                steps, values = curves.setdefault(row["name"], ([], []))
                steps.append(float(line["step"]))
                values.append(float(row["f1"]))
        return curves

    def objectives(self) -> list[str]:
        """The objectives beside the task losses, `task/objective`, in the order of their appearance."""
        return _names(self.steps, "objective")

    def objective(self, name: str) -> Series:
        """Loss of an objective: steps and values."""
        return _series(self.steps, "objective", name)

    def weighted_tasks(self) -> list[str]:
        """The tasks whose losses have a learned weight."""
        return _names(self.steps, "weights")

    def weights(self, task: str) -> Series:
        """Learned weight of a task's loss, each the mean over the steps since the line before: steps and values."""
        return _series(self.steps, "weights", task)

    def gradient_names(self, kind: str) -> list[str]:
        """The tasks (`norm`) or pairs of tasks (`cosine`, `conflict`, `altered`) with a figure of that kind."""
        return _names(self.steps, "gradients", kind)

    def gradients(self, kind: str, name: str) -> Series:
        """A figure of the tasks' gradients, each the mean over the steps since the line before: steps and values."""
        return _series(self.steps, "gradients", kind, name)

    def gradient_mean(self, kind: str, name: str) -> float | None:
        """The mean of a figure over all steps that have it; None where none has."""
        total = weight = 0.0
        for line in self.steps:
            figures = line.get("gradients") or {}
            value = (figures.get(kind) or {}).get(name)
            if value is not None:
                count = float(figures.get("steps") or 1)
                total, weight = total + count * float(value), weight + count
        return total / weight if weight else None

    def embedding(self, measure: str) -> Series:
        """`alignment` or `uniformity` of the sentence embeddings over the evaluations: steps and values."""
        return _series(self.evaluations, "embedding", measure)

    def phases(self) -> list[dict[str, Any]]:
        """The evaluations at whose step the phase of a task was over, in their order."""
        return [line for line in self.evaluations if line.get("phase")]

    def column(self, name: str) -> Series:
        """A number of the step lines (`lr`, `grad_norm`, `total_loss`): steps and values."""
        return _series(self.steps, name)

    def skipped_steps(self) -> int:
        """Steps that fp16's loss scale made overflow, and that were skipped."""
        return sum(int(line.get("skipped") or 0) for line in self.steps)

    def epoch_times(self) -> list[EpochTime]:
        """What every epoch took: the differences of the epoch lines, which count from the run's start."""
        times, seconds, tokens = [], 0.0, 0
        for line in self.epochs:
            after, read = float(line.get("seconds") or 0.0), int(line.get("tokens") or 0)
            times.append(EpochTime(float(line["epoch"]), line["step"], after - seconds, read - tokens))
            seconds, tokens = after, read
        return times

    def best_evaluation(self) -> dict[str, Any] | None:
        """The evaluation with the highest selection score, the earliest of equals; None without any."""
        scored = [line for line in self.evaluations if line.get("score") is not None]
        return max(scored, key=lambda line: float(line["score"])) if scored else None


def _series(lines: list[dict[str, Any]], *keys: str) -> Series:
    steps, values = [], []
    for line in lines:
        value: Any = line
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            steps.append(float(line["step"]))
            values.append(float(value))
    return steps, values


def _names(lines: list[dict[str, Any]], *keys: str) -> list[str]:
    """The keys of the objects under `keys`, each once."""
    names: dict[str, None] = {}
    for line in lines:
        value: Any = line
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        names |= dict.fromkeys(value or ())
    return list(names)


def read_history(path: Path) -> History:
    """Read metrics.jsonl; a last line that is cut off (a killed run) is left out.

    Raises DataError naming file and line for a missing file or any other line that does not fit.
    """
    history = History()
    by_kind = dict(zip(KINDS, (history.steps, history.evaluations, history.epochs), strict=True))
    for row in _lines(path):
        by_kind[row["kind"]].append(row)
    return history


def _lines(path: Path) -> list[dict[str, Any]]:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise DataError(f"{path}: expected a file, found something else")
    try:
        texts = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found; a run writes its losses and scores there") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    result: list[dict[str, Any]] = []
    for number, raw in enumerate(texts, start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError) as error:
            if number == len(texts):  # no line end: the writer was stopped in the middle
                break
            raise DataError(f"{path}: line {number} is not JSON: {raw[:80]!r}") from error
        if not isinstance(row, dict) or row.get("kind") not in KINDS or not isinstance(row.get("step"), int):
            if number == len(texts):  # "12" is JSON too, and may be the head of a longer line
                break
            expected = ", ".join(KINDS)
            raise DataError(
                f'{path}: line {number}: expected an object with "kind" ({expected}) and a whole "step", '
                f"found {raw[:80]!r}"
            )
        problem = _problem(row)
        if problem is not None:
            raise DataError(f"{path}: line {number}: {problem}")
        result.append(row)
    return result


_FIGURES = (
    "epoch",
    "seconds",
    "tokens",
    "score",
    "skipped",
    "lr",
    "grad_norm",
    "total_loss",
    "tokens_per_second",
)
_GROUPS = ("loss", "train_loss", "dev_loss", "objective", "weights", "gradients", "embedding")


def _problem(row: dict[str, Any]) -> str | None:
    """What is wrong with a line, for whoever reads figures and scores from it; None when nothing is."""
    for name in _FIGURES:
        if not _is_figure(row.get(name)):
            return f"{name}: expected a number, found {str(row[name])[:80]!r}"
    for name in _GROUPS:
        if not _are_figures(row.get(name), levels=2):
            return f"{name}: expected numbers by name, found {str(row[name])[:80]!r}"
    if row["kind"] == "epoch" and row.get("epoch") is None:
        return "expected an epoch"
    for name in ("train", "dev"):
        by_task = row.get(name) or {}
        if not isinstance(by_task, dict) or not all(isinstance(scores, dict) for scores in by_task.values()):
            return f"{name}: expected scores by task, found {str(by_task)[:80]!r}"
        for task, scores in by_task.items():
            if not all(_is_score(key, value) for key, value in scores.items()):
                return f"{name}.{task[:40]}: expected scores, found {str(scores)[:80]!r}"
    return None


def _is_figure(value: Any) -> bool:
    return value is None or (type(value) is int and abs(value) < 2**63) or type(value) is float


def _are_figures(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        return levels > 0 and all(_are_figures(inner, levels - 1) for inner in value.values())
    return _is_figure(value) and (levels < 2 or value is None)


def _is_score(key: str, value: Any) -> bool:
    if key == "kind":
        return isinstance(value, str)
    if key == "classes":
        names = {"name", "precision", "recall", "f1", "support", "predicted"}
        return isinstance(value, list) and all(
            isinstance(one, dict)
            and one.keys() == names
            and isinstance(one["name"], str)
            and all(_is_figure(one[name]) and one[name] is not None for name in names - {"name"})
            for one in value
        )
    if key == "confusion":
        return isinstance(value, list) and all(
            isinstance(row, list) and all(map(_is_figure, row)) for row in value
        )
    return _is_figure(value)
