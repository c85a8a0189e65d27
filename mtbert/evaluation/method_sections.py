"""The report's sections on methods beside plain training, each only where the run's history has something to show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mtbert.evaluation.forgetting import backward_transfer, phase_rows, phases
from mtbert.evaluation.halves import WHOLE
from mtbert.evaluation.history import History, epoch_text
from mtbert.evaluation.markdown import escape, image_links
from mtbert.evaluation.table import Cell, markdown_table

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task


def method_sections(
    history: History,
    tasks: Mapping[str, Task],
    plots: Mapping[str, Path],
    folder: Path,
    *,
    dev: str = WHOLE,
) -> list[str]:
    """Sections in Markdown; `plots` are the run's figures by name, linked relative to `folder`.

    dev: what the evaluations of the training call dev.
    """
    sections = [
        _objectives(history, plots, folder),
        _gradients(history, plots, folder),
        _weights(history, plots, folder),
        _embedding(history, plots, folder, dev),
        _forgetting(history, tasks, plots, folder, dev),
    ]
    return [section for section in sections if section]


def _objectives(history: History, plots: Mapping[str, Path], folder: Path) -> str:
    rows: list[list[Cell]] = []
    for name in history.objectives():
        _, values = history.objective(name)
        if values:
            rows.append([escape(name), values[0], values[-1], min(values)])
    if not rows:
        return ""
    headers = ["task/objective", "first", "last", "lowest"]
    note = "Training losses with their weights in them, means over the steps of a line of metrics.jsonl."
    return _section(
        "Objectives",
        markdown_table(headers, rows, digits=4),
        note,
        image_links(plots, folder, ("objectives",)),
    )


def _gradients(history: History, plots: Mapping[str, Path], folder: Path) -> str:
    pairs, tasks = history.gradient_names("cosine"), history.gradient_names("norm")
    if not pairs and not tasks:
        return ""
    rows: list[list[Cell]] = []
    for pair in pairs:
        first, _, second = pair.partition("/")
        rows.append(
            [
                escape(pair),
                history.gradient_mean("cosine", pair),
                _percent(history.gradient_mean("conflict", pair)),
                _percent(history.gradient_mean("altered", f"{first}/{second}")),
                _percent(history.gradient_mean("altered", f"{second}/{first}")),
            ]
        )
    headers = ["pair", "mean cosine", "in conflict", "first altered", "second altered"]
    norms: list[list[Cell]] = [[escape(task), history.gradient_mean("norm", task)] for task in tasks]
    note = (
        "The gradients of the tasks' losses over the parameters that tasks share, means over all steps that held both"
        " tasks. `in conflict`: share of steps with a cosine below 0; `first altered`: share of steps in which the"
        " gradient of the pair's first task was altered (projected) along that of the second."
    )
    return _section(
        "Gradients",
        markdown_table(headers, rows) if rows else "",
        markdown_table(["task", "mean norm"], norms) if norms else "",
        note,
        image_links(plots, folder, ("gradients",)),
    )


def _weights(history: History, plots: Mapping[str, Path], folder: Path) -> str:
    rows: list[list[Cell]] = []
    for task in history.weighted_tasks():
        _, values = history.weights(task)
        if values:
            rows.append([escape(task), values[0], values[-1], min(values), max(values)])
    if not rows:
        return ""
    headers = ["task", "first", "last", "lowest", "highest"]
    note = (
        "What uncertainty weighting multiplies each task's loss by, beside its `loss.weight`; means over the steps of a"
        " line of metrics.jsonl."
    )
    return _section(
        "Learned weights",
        markdown_table(headers, rows),
        note,
        image_links(plots, folder, ("weights",)),
    )


def _percent(share: float | None) -> Cell:
    return None if share is None else f"{share:.1%}"


def _embedding(history: History, plots: Mapping[str, Path], folder: Path, dev: str) -> str:
    best = history.best_evaluation()
    rows: list[list[Cell]] = []
    for line in history.evaluations:
        found = line.get("embedding")
        if found:
            epoch = epoch_text(float(line.get("epoch") or 0.0)) + (" (best)" if line is best else "")
            rows.append([epoch, line["step"], found.get("alignment"), found.get("uniformity")])
    if not rows:
        return ""
    note = (
        f"Of sentence embeddings of length 1 on {dev} (Wang and Isola 2020); lower is better in both. Alignment: the"
        " mean squared distance of positive pairs. Uniformity: the logarithm of the mean of exp(-2 x squared distance)"
        " over all pairs."
    )
    return _section(
        "Alignment and uniformity",
        markdown_table(["epoch", "step", "alignment", "uniformity"], rows),
        note,
        image_links(plots, folder, ("embedding",)),
    )


def _forgetting(
    history: History, tasks: Mapping[str, Task], plots: Mapping[str, Path], folder: Path, dev: str
) -> str:
    found = phases(history, tasks)
    if not found:
        return ""
    headers, rows = phase_rows(found, tasks)
    note = f"Scores on {dev} after each phase; in brackets the change since the end of the task's own latest phase."
    change = backward_transfer(found)
    if change is not None:
        note += (
            f" At the end the tasks are {change:+.3f} from there on average, the one trained last aside (backward"
            " transfer, Lopez-Paz and Ranzato 2017; below 0 is forgetting)."
        )
    body = [[escape(str(cell)) for cell in row] for row in rows]
    return _section(
        "Forgetting",
        markdown_table([escape(header) for header in headers], body),
        note,
        image_links(plots, folder, ("forgetting",)),
    )


def _section(title: str, *parts: str) -> str:
    return "\n\n".join([f"## {title}", *filter(None, parts)])
