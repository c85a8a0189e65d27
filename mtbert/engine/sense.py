"""Combinations that would run and mean nothing: refused before a run begins."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from mtbert.curriculum import Curriculum
from mtbert.errors import ConfigError
from mtbert.model.multitask import MultiTaskModel

if TYPE_CHECKING:
    from mtbert.config import TrainConfig


def check_sense(config: TrainConfig, model: MultiTaskModel, curriculum: Curriculum) -> None:
    """Raise ConfigError for a method that could never act, and for a task that nothing trains."""
    _check_surgery(config, model, curriculum)
    _check_losses(config)
    _check_untrained_heads(config, model)
    _check_checkpointing(config, model)
    if (
        config.simcse.tasks
        and not config.simcse.supervised
        and not any(dataclasses.astuple(config.model.dropout))
    ):
        raise ConfigError(
            "simcse.tasks: the two views of a sentence differ by dropout alone, and model.dropout is 0 everywhere;"
            " possible: dropout above 0, or simcse.supervised"
        )


def _check_surgery(config: TrainConfig, model: MultiTaskModel, curriculum: Curriculum) -> None:
    """Raise ConfigError for a combination of gradients that could never have two to combine."""
    surgery = config.surgery
    if surgery.method != "sum":
        asked = f"surgery.method: {surgery.method}"
    elif surgery.measure:
        asked = "surgery.measure: true"
    else:
        return
    if len(config.tasks) < 2:
        raise ConfigError(f"{asked} needs several tasks, found {', '.join(config.tasks)}; possible: sum")
    if surgery.method == "uncertainty" and not surgery.measure:
        return
    if not curriculum.joins_tasks:
        raise ConfigError(
            f"{asked} needs the gradients of several tasks in a step, but with curriculum.mixing"
            f" {config.curriculum.mixing} each step has one task; possible: mixing parallel or dynamic"
        )
    if not model.shared_parameters():
        raise ConfigError(
            f"{asked} combines gradients of trained parameters that tasks share, and there are none: the mode is"
            f" {config.mode}{' with adapters for each task' if config.model.lora.per_task else ''}; possible: sum"
        )


def _check_losses(config: TrainConfig) -> None:
    """Something must learn from labels or from contrasts: smoothness alone has nothing to smooth."""
    groups = (config.simcse, config.mnrl, config.cosine_embedding, config.triplet)
    weights = [config.task[name].loss.weight for name in config.tasks]
    if not any(weights) and not any(group.tasks and group.weight for group in groups):
        raise ConfigError(
            "loss.weight: the weights of all tasks are 0 and no objective learns from labels or contrasts: there is"
            " nothing to train"
        )


def _check_checkpointing(config: TrainConfig, model: MultiTaskModel) -> None:
    """A layer that the backward pass never reaches keeps nothing that could be computed again."""
    again = config.checkpointing.layer_numbers(len(model.encoder.layers))
    lowest = model.encoder.lowest_trained_layer
    if again and again[-1] < lowest and not config.smart.tasks:  # SMART's passes reach the embeddings
        raise ConfigError(
            f"checkpointing.mode: {config.checkpointing.mode} would have no effect: layers {again} would be"
            f" computed again, but nothing below layer {lowest} is trained; possible: none"
        )


def _check_untrained_heads(config: TrainConfig, model: MultiTaskModel) -> None:
    """A task without a loss of its own is evaluated by a head that nothing trains: it must have no parameters."""
    for name in config.tasks:
        if config.task[name].loss.weight:
            continue
        head = config.task[name].head
        if any(True for _ in model.head(name).parameters()):
            raise ConfigError(
                f"{name}.loss.weight: with 0 nothing trains the head that evaluates {name}; possible: above 0, or a"
                f" head without parameters ({name}.head.pair [cosine], {name}.head.tower_layers 0, for a similarity)"
            )
        for group in ("simcse", "mnrl", "cosine_embedding", "triplet"):
            settings = getattr(config, group)
            if name in settings.tasks and settings.pooling != head.pooling:
                raise ConfigError(
                    f"{name}.head.pooling: {head.pooling}, but {group}.pooling is {settings.pooling}: with"
                    f" {name}.loss.weight 0 the cosine that is evaluated must be the one that is trained"
                )
