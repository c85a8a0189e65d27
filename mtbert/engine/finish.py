"""The end of a run: the best checkpoint's predictions, its scores, and the report."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import nn

from mtbert.data.dataset import TaskData
from mtbert.data.tables import Table
from mtbert.engine.checkpoint import CheckpointStore
from mtbert.engine.distributed import ALONE, World
from mtbert.engine.evaluator import seeded_sample
from mtbert.engine.forward import Forward
from mtbert.engine.inference import infer
from mtbert.engine.predictor import Predictor
from mtbert.errors import CheckpointError
from mtbert.evaluation.predictions import SINGLE_TASK_COURSE_TASKS, Predictions, write_prediction_files
from mtbert.evaluation.swaps import MOST_PAIRS, SwapConsistency, swap_consistency
from mtbert.ranges import span
from mtbert.tasks.registry import Task

logger = logging.getLogger(__name__)


def load_best_weights(model: nn.Module, folder: Path, world: World = ALONE) -> int:
    """Put the best checkpoint's weights into `model`; returns its step. Raises CheckpointError when there is none.

    Rank 0 reads it for all ranks.
    """
    step = world.told(lambda: _load_best_weights(model, folder))
    world.copied(model.state_dict().values())
    return step


def _load_best_weights(model: nn.Module, folder: Path) -> int:
    checkpoint = CheckpointStore(folder).load_best(logger.warning)
    if checkpoint is None:
        raise CheckpointError(f"{folder} holds no evaluated checkpoint")
    own = model.state_dict()
    for name, value in checkpoint.model.items():
        # Copying would take anything for a number: the real part of a complex one, whole numbers, true and false.
        if name in own and value.is_floating_point() != own[name].is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise CheckpointError(f"{checkpoint.path}: {name} has dtype {kind}, expected {own[name].dtype}")
    try:
        model.load_state_dict(checkpoint.model)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.path} does not fit the configured model: {error}") from error
    return checkpoint.step


def predict_split(
    forward: Forward, task: Task, data: TaskData, split: str, *, max_tokens: int, world: World = ALONE
) -> Predictions:
    """Predictions of a whole table; the ranks share the work."""
    outputs = infer(forward, data, max_tokens=max_tokens, world=world)
    return Predictions(task.name, split, tuple(data.ids), data.labels, outputs)


def predict_all(
    forward: Forward,
    tasks: Mapping[str, Task],
    data: Mapping[str, Mapping[str, TaskData]],
    *,
    max_tokens: int,
    folder: Path,
    mode: str,
    world: World = ALONE,
) -> dict[str, Predictions]:
    """Predict dev and test of every task; returns dev's. Rank 0 writes the files under `folder`/predictions."""
    dev: dict[str, Predictions] = {}
    # The course's second objective is a sentiment task by itself; its files are named after the mode.
    alone = set(tasks) <= set(SINGLE_TASK_COURSE_TASKS)
    course_mode = {"full": "full-model", "last-linear-layer": mode}.get(mode) if alone else None
    for name, task in tasks.items():
        for split in ("dev", "test"):
            if split in data[name]:
                with span("prediction", name, split):
                    predictions = predict_split(
                        forward, task, data[name][split], split, max_tokens=max_tokens, world=world
                    )
                if world.is_main:
                    write_prediction_files(folder, task, predictions, mode=course_mode)
                if split == "dev":
                    dev[name] = predictions
    return dev


def swap_pairs(predictor: Predictor, task: Task, table: Table, *, seed: int = 0) -> SwapConsistency:
    """How a task's outputs change when the sentences of a pair do; on a seeded sample of at most MOST_PAIRS pairs."""
    chosen = seeded_sample(len(table), MOST_PAIRS, seed, task.name)
    outputs, swapped = predictor.both_ways(task.name, [table.texts[place] for place in chosen])
    return swap_consistency(task, outputs, swapped, of=len(table))


def dev_examples(
    data: Mapping[str, Mapping[str, TaskData]],
) -> dict[str, tuple[list[str], list[tuple[str, ...]], np.ndarray | None]]:
    """The dev sentences by task, for the report's worst errors."""
    tables = {name: splits["dev"].table for name, splits in data.items()}
    return {name: (table.ids, table.texts, table.labels) for name, table in tables.items()}
