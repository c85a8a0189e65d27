"""Configurations from plain values, without the command line's parser, which takes half a second."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

from mtbert.config import TrainConfig
from mtbert.tasks.config import TaskConfig
from mtbert.tasks.registry import TASKS


def config_of(values: dict[str, Any]) -> TrainConfig:
    """What a preset's or a run's YAML holds, each task's settings under the task's name."""
    tasks = {task: _build(TaskConfig, values[task]) for task in TASKS if task in values}
    return _build(TrainConfig, {k: v for k, v in values.items() if k not in TASKS} | {"task": tasks})


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _build(kind: type, values: dict[str, Any]) -> Any:
    """The dataclass of a mapping; a TypeError for a key that it does not have."""
    hints = _hints(kind)
    nested = {
        name: _build(hints[name], value) if dataclasses.is_dataclass(hints.get(name)) else value
        for name, value in values.items()
    }
    return kind(**nested)
