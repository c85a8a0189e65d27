"""A small training setup in memory: the built-in sample, a tiny BERT in any dtype, and a TrainStep."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from mtbert.config import TrainConfig
from mtbert.data.batching import TaskBatches
from mtbert.data.tables import Table
from mtbert.engine.build import (
    Machine,
    TaskSplits,
    build_forward,
    load_model,
    prepare_data,
    task_batches,
    tasks_of,
)
from mtbert.engine.distributed import ALONE, World
from mtbert.engine.forward import Forward
from mtbert.engine.frozen_prefix import keep_tables
from mtbert.engine.methods import build_train_step, task_losses
from mtbert.engine.step import TrainStep
from mtbert.losses.task_losses import TaskLoss
from mtbert.model.multitask import MultiTaskModel
from mtbert.tasks.config import TaskConfig
from mtbert.tasks.loading import load_tables


@dataclasses.dataclass
class Assembly:
    """Everything that a test of the engine may want to look at."""

    config: TrainConfig
    model: MultiTaskModel
    data: TaskSplits
    losses: dict[str, TaskLoss]
    forward: Forward
    step: TrainStep
    batches: dict[str, TaskBatches]


def tiny_config(bert: Path, cache: Path, **changes: object) -> TrainConfig:
    """Three tasks on the sample with a tiny BERT, batches of 6 examples."""
    config = TrainConfig(
        task={name: TaskConfig(batch_size=6, max_length=64) for name in ("sst", "para", "sts")},
        max_tokens=1024,
        cache=str(cache),
    )
    config.model.pretrained = str(bert)
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def shortened(table: Table, rows: int) -> Table:
    """The first rows of a table."""
    return dataclasses.replace(
        table,
        ids=table.ids[:rows],
        texts=table.texts[:rows],
        labels=None if table.labels is None else table.labels[:rows],
        lines=table.lines[:rows],
    )


def assemble(
    config: TrainConfig, *, dtype: torch.dtype = torch.float64, rows: int = 60, world: World = ALONE
) -> Assembly:
    """Build it with activations of `dtype`, parameters of at least float32 and the first `rows` rows of every table."""
    tasks = tasks_of(config)
    tables = {
        name: {split: shortened(table, rows) for split, table in splits.items()}
        for name, splits in load_tables(config.data, list(tasks.values())).items()
    }
    machine = Machine(torch.device("cpu"), dtype, world)
    model, tokeniser = load_model(config, machine)
    model.to(torch.promote_types(dtype, torch.float32))
    data = prepare_data(config, tables, tokeniser)
    losses = task_losses(config, machine, data)
    forward = build_forward(config, model, machine)
    step = build_train_step(config, machine, model, forward, losses, tables, data, tokeniser)
    keep_tables(forward, [*step.data.values(), *(splits["dev"] for splits in data.values())])
    return Assembly(config, model, data, losses, forward, step, task_batches(config, data))
