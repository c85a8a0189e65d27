"""run.json: the facts of a run that its report needs and its configuration does not hold."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mtbert.data.dataset import TaskData
from mtbert.data.overlap import train_dev_overlap
from mtbert.data.tables import Table
from mtbert.engine.run_folder import RunFolder
from mtbert.evaluation.baselines import label_histogram
from mtbert.model.multitask import MultiTaskModel
from mtbert.model.pretrained import MINILM, origin
from mtbert.tasks.loading import SAMPLE
from mtbert.tasks.registry import Task, get_task

if TYPE_CHECKING:
    from mtbert.config import TrainConfig

logger = logging.getLogger(__name__)

CONTAMINATION = (
    "The bundled MiniLM was trained on a billion sentence pairs, Quora question pairs among them: its paraphrase"
    " scores are optimistic."
)
_MOST_PROBLEMS = 100


def describe_data(data: Mapping[str, Mapping[str, TaskData]]) -> dict[str, Any]:
    """Rows, problems, truncation, label counts and overlap by task and split (JSON-able); logs the oddities."""
    described: dict[str, Any] = {}
    for name, splits in data.items():
        described[name] = {}
        for split, examples in splits.items():
            table = examples.table
            described[name][split] = {
                "file": str(table.path),
                "rows": len(table),
                "problems": [str(problem) for problem in table.problems[:_MOST_PROBLEMS]],
                "problem_count": len(table.problems),
                "duplicate_ids": table.duplicate_ids,
                "truncated": examples.n_truncated,
                "max_length": examples.max_length,
                "tokens": int(examples.lengths.sum()),
                "labels": label_histogram(get_task(name), examples.labels),
            }
            if table.extra:
                described[name][split] |= _describe_extra(get_task(name), table)
            for problem in table.problems[:5]:
                logger.warning("row left out: %s", problem)
            if len(table.problems) > 5:
                more = len(table.problems) - 5
                logger.warning("%s: %d more rows left out (problems.txt has them all)", table.path, more)
            if examples.n_truncated:
                logger.info(
                    "%s %s: %d of %d examples truncated to %d tokens",
                    name,
                    split,
                    examples.n_truncated,
                    len(table),
                    examples.max_length,
                )
        overlap = train_dev_overlap(splits["train"].table, splits["dev"].table)
        described[name]["dev"]["overlap"] = len(overlap)
        if overlap:
            logger.warning("%s: %d dev examples also stand in train", name, len(overlap))
    return described


def _describe_extra(task: Task, table: Table) -> dict[str, Any]:
    """What joined a training table, and the labels of its own rows, which the baselines are of; logs it."""
    assert table.labels is not None
    own = len(table) - sum(extra.rows for extra in table.extra)
    for extra in table.extra:
        left_out = f", {extra.left_out:,} left out" if extra.left_out else ""
        logger.info(
            "%s: %s rows of %s join the training table%s", task.name, f"{extra.rows:,}", extra.path, left_out
        )
    return {
        "own_labels": label_histogram(task, table.labels[:own]),
        "extra": [
            {
                "file": str(extra.path),
                "sha256": extra.sha256,
                "rows": extra.rows,
                "left_out": extra.left_out,
                "labels": label_histogram(task, extra.labels),
            }
            for extra in table.extra
        ],
    }


def write_problems(run: RunFolder, data: Mapping[str, Mapping[str, TaskData]]) -> None:
    """problems.txt: every row that was left out, by file, line and reason; no file when there is none."""
    tables = [examples.table for splits in data.values() for examples in splits.values()]
    problems = [f"{problem}\n" for table in tables for problem in table.problems]
    if problems:
        run.write_text(run.path / "problems.txt", "".join(problems))


def describe_run(
    config: TrainConfig,
    environment: Mapping[str, Any],
    name: str,
    model: MultiTaskModel,
    data: Mapping[str, Mapping[str, TaskData]],
) -> dict[str, Any]:
    """Everything that goes into run.json."""
    parts = {
        count.part: {"trainable": count.trainable, "total": count.total} for count in model.parameter_counts()
    }
    return {
        **environment,
        "name": name,
        "parameters": parts.pop("total") | {"parts": parts},
        "data": describe_data(data),
        "tasks": list(config.tasks),
        "encoder": config.model.pretrained,
        "mode": config.mode,
        "seed": config.seed,
        "synthetic": config.data == SAMPLE,
        "contamination": CONTAMINATION
        if origin(config.model.pretrained) == MINILM and "para" in config.tasks
        else None,
    }
