"""Combinations that would run and mean nothing: refused before a run begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtbert.curriculum import Curriculum
from mtbert.errors import ConfigError
from mtbert.losses.divergence import has_encoder_dropout
from mtbert.model.multitask import MultiTaskModel

if TYPE_CHECKING:
    from mtbert.config import TrainConfig


_LEARNING = ("simcse", "mnrl", "cosine_embedding", "triplet")
"""Objectives that learn from labels or from contrasts."""
_SMOOTHING = ("smart", "bregman")
"""Objectives that hold back or smooth what others learn."""


def check_sense(config: TrainConfig, model: MultiTaskModel, curriculum: Curriculum) -> None:
    """Raise ConfigError for a method that could never act, and for a task that nothing trains."""
    _check_losses(config)
    _check_surgery(config, model, curriculum)
    _check_untrained_heads(config, model)
    _check_checkpointing(config, model)
    _check_profile(config, curriculum)
    _check_views(config)
    _check_perturbation(config, model)
    _check_frozen_dropout(config, model)
    _check_dynamic(config)
    _check_warmup(config, curriculum)


def _check_surgery(config: TrainConfig, model: MultiTaskModel, curriculum: Curriculum) -> None:
    """Raise ConfigError for a combination of gradients that could never have two to combine."""
    surgery = config.surgery
    if surgery.method != "sum":
        asked, off = f"surgery.method: {surgery.method}", "sum"
    elif surgery.measure:
        asked, off = "surgery.measure: true", "false"
    else:
        return
    # Learned weights are those of the tasks' own losses; a gradient may also come from an objective.
    groups = () if surgery.method == "uncertainty" else (*_LEARNING, *_SMOOTHING)
    trained = [name for name in config.tasks if _is_trained(config, name, groups)]
    if len(trained) < 2:
        raise ConfigError(
            f"{asked} needs several tasks with a loss, found {', '.join(trained) or 'none'} of"
            f" {', '.join(config.tasks)}; possible: {off}, or more tasks with loss.weight above 0"
        )
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
            f" {config.mode}{' with adapters for each task' if config.model.lora.per_task else ''}; possible: {off}"
        )


def _check_profile(config: TrainConfig, curriculum: Curriculum) -> None:
    """The steps must last until a profile begins."""
    skipped, steps = config.profiling.skip_steps, curriculum.total_steps
    if config.profile == "torch" and skipped >= steps:
        below = f"profiling.skip_steps below {steps}, " if steps > 1 else ""
        raise ConfigError(
            f"profiling.skip_steps: {skipped} steps are left out before the first that is recorded, but training on"
            f" {', '.join(config.tasks)} takes {steps}; possible: {below}more epochs, or profile none"
        )


def _is_trained(config: TrainConfig, task: str, groups: Sequence[str]) -> bool:
    """Whether a task has a loss of its own, or one of the objectives `groups`, whose weights are above 0."""
    return config.task[task].loss.weight > 0 or any(task in getattr(config, group).tasks for group in groups)


def _check_losses(config: TrainConfig) -> None:
    """Something must learn from labels or from contrasts: smoothness alone has nothing to smooth."""
    if not any(_is_trained(config, name, _LEARNING) for name in config.tasks):
        raise ConfigError(
            f"{', '.join(f'{name}.loss.weight' for name in config.tasks)}: found 0, and no objective learns from labels"
            " or contrasts: there is nothing to train; possible: above 0 for one of them, or a task in"
            f" {', '.join(f'{group}.tasks' for group in _LEARNING)}"
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
    """A task without a loss of its own is evaluated by a head that nothing trains: it must do without."""
    for name in config.tasks:
        if config.task[name].loss.weight:
            continue
        head = config.task[name].head
        if not model.head(name).ready:
            raise ConfigError(
                f"{name}.loss.weight: with 0 nothing trains the head that evaluates {name}; possible: above 0, or for"
                f" pairs a head that needs no training ({name}.head.pair [cosine] or [dot], {name}.head.tower_layers 0)"
            )
        for group in _LEARNING:
            settings = getattr(config, group)
            if name in settings.tasks and settings.pooling != head.pooling:
                raise ConfigError(
                    f"{name}.head.pooling: {head.pooling}, but {group}.pooling is {settings.pooling}: with"
                    f" {name}.loss.weight 0 the cosine that is evaluated must be the one that is trained"
                )


def _check_views(config: TrainConfig) -> None:
    """The two views of unsupervised SimCSE must differ."""
    simcse = config.simcse
    if simcse.tasks and not simcse.supervised and not any(dataclasses.astuple(config.model.dropout)):
        raise ConfigError(
            "simcse.tasks: the two views of a sentence differ by dropout alone, and model.dropout is 0 everywhere;"
            " possible: dropout above 0, or simcse.supervised"
        )


def _check_perturbation(config: TrainConfig, model: MultiTaskModel) -> None:
    """The passes that SMART compares must differ: by their noise, or by their masks."""
    smart, field = config.smart, config.smart.without_noise
    if field is None:
        return
    fresh = smart.masks == "fresh"
    drops = has_encoder_dropout(model) or (config.mode == "lora" and config.model.lora.dropout > 0)
    for task in smart.tasks:
        if fresh and (drops or model.head(task).draws_masks):
            continue
        masks = "nothing drops" if fresh else f"smart.masks is {smart.masks}"
        raise ConfigError(
            f"smart.{field}: found 0, and {masks}: the passes of {task} would not differ and its regulariser be"
            f" exactly 0; possible: above 0, or {'dropout above 0' if fresh else 'smart.masks fresh with dropout'}"
        )


def _check_frozen_dropout(config: TrainConfig, model: MultiTaskModel) -> None:
    """Something must be frozen, and would drop."""
    if config.model.frozen_dropout:
        return
    if config.mode == "last-linear-layer":
        why, possible = "a wholly frozen encoder never drops", "mode full with model.trained_layers"
    elif not model.encoder.lowest_trained_layer:
        why = f"mode {config.mode} trains in the first layer or below it"
        possible = "model.trained_layers below the number of layers, or model.lora.layers in mode lora"
    elif not has_encoder_dropout(model):
        why, possible = "model.dropout is 0 everywhere", "dropout above 0"
    else:
        return
    raise ConfigError(
        f"model.frozen_dropout: false would have no effect, because {why}; possible: {possible}, or true"
    )


def _check_dynamic(config: TrainConfig) -> None:
    """Every task keeps a row of a step: to share out the others, two tasks must have some."""
    sizes = {name: config.task[name].batch_size for name in config.tasks}
    if config.curriculum.mixing == "dynamic" and sum(size > 1 for size in sizes.values()) < 2:
        found = ", ".join(f"{name}.batch_size {size}" for name, size in sizes.items())
        raise ConfigError(
            "curriculum.mixing: dynamic moves rows between tasks with a batch_size above 1 and needs two of them, found"
            f" {found}; possible: parallel, or larger batches"
        )


def _check_warmup(config: TrainConfig, curriculum: Curriculum) -> None:
    """The warm-up must end within the run."""
    warmup, steps = config.schedule.warmup, curriculum.total_steps
    if warmup >= 1 and warmup > steps:
        raise ConfigError(
            f"schedule.warmup: found {warmup:g} steps, but the run has {steps}: the peak rate would never be reached;"
            f" possible: up to {steps}, or a share of the run below 1"
        )
