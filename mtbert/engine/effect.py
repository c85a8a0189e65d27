"""Settings that nothing would read: refused before a run begins, because whoever gave them expects an effect."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from mtbert.errors import ConfigError
from mtbert.tasks.registry import TASKS

if TYPE_CHECKING:
    from mtbert.config import TrainConfig

_OBJECTIVES = ("simcse", "mnrl", "cosine_embedding", "triplet", "smart", "bregman")


def check_effect(config: TrainConfig) -> None:
    """Raise ConfigError for a setting that differs from its default while what reads it is off."""
    for name in _OBJECTIVES:
        group = getattr(config, name)
        if not group.tasks:
            _refuse(name, group, f"{name}.tasks is empty", f"{name}.tasks with one or more of {config.tasks}")
    if config.mode != "lora":
        _refuse("model.lora", config.model.lora, f"the mode is {config.mode}", "mode lora")
        _refuse("model", config.model, f"the mode is {config.mode}", "mode lora", only=("adapter",))
    if config.mode not in ("full", "bitfit"):
        why = f"the mode is {config.mode}"
        _refuse("model", config.model, why, "mode full or bitfit", only=("trained_layers",))
    if config.frozen_cache.use == "never":
        off = "frozen_cache.use is never"
        _refuse("frozen_cache", config.frozen_cache, off, "frozen_cache.use auto", only=("most_gib",))
    checkpointing = config.checkpointing
    if checkpointing.mode == "none":
        off = "checkpointing.mode is none"
        _refuse(
            "checkpointing", checkpointing, off, "checkpointing.mode layers or selective", only=("every",)
        )
    if config.mode == "last-linear-layer":
        off = "mode last-linear-layer has no backward pass through the encoder"
        _refuse("checkpointing", checkpointing, off, "mode full, lora or bitfit", only=("mode",))
    pretraining = config.pretraining
    if not pretraining.mlm_epochs:
        off = "pretraining.mlm_epochs is 0"
        fields = ("mlm_lr", "mlm_batch_tokens", "mlm_probability")
        _refuse("pretraining", pretraining, off, "pretraining.mlm_epochs above 0", only=fields)
    if pretraining.task is None:
        off = "pretraining.task is not given"
        _refuse("pretraining", pretraining, off, "pretraining.task", only=("task_epochs",))
    if not config.unfreezing.gradual:
        off = "unfreezing.gradual is false"
        _refuse("unfreezing", config.unfreezing, off, "unfreezing.gradual true", only=("epochs_per_layer",))
    if config.profile != "torch":
        _refuse("profiling", config.profiling, f"profile is {config.profile}", "profile torch")
    if not config.model.extra_hidden.depth:
        off = "model.extra_hidden.depth is 0"
        _refuse("model.extra_hidden", config.model.extra_hidden, off, "model.extra_hidden.depth above 0")
    if not config.model.pals.size:
        _refuse("model.pals", config.model.pals, "model.pals.size is 0", "model.pals.size above 0")
    _check_thresholds(config)
    _check_phases(config)
    for method, path, group, name in (
        ("gradvac", "surgery", config.surgery, "gradvac_decay"),
        ("cagrad", "surgery", config.surgery, "cagrad_c"),
        ("uncertainty", "optim", config.optim, "uncertainty_lr"),
    ):
        if config.surgery.method != method:
            off = f"surgery.method is {config.surgery.method}"
            _refuse(path, group, off, f"surgery.method {method}", only=(name,))


def _check_thresholds(config: TrainConfig) -> None:
    """Only similarity scores are compared with a threshold, and not by every variant of an objective."""
    simcse, cosine = config.simcse, config.cosine_embedding
    if simcse.tasks and not simcse.supervised:
        off = "simcse.supervised is false"
        _refuse("simcse", simcse, off, "simcse.supervised true", only=("threshold",))
    if cosine.tasks and cosine.labels == "extremes":
        off = "cosine_embedding.labels is extremes"
        _refuse("cosine_embedding", cosine, off, "labels threshold", only=("threshold",))
    for name, fields in (
        ("simcse", ("threshold",)),
        ("mnrl", ("threshold",)),
        ("cosine_embedding", ("labels", "threshold")),
    ):
        group = getattr(config, name)
        if group.tasks and not any(_has_scores(task) for task in group.tasks):
            off = f"{name}.tasks names no similarity ({', '.join(group.tasks)})"
            _refuse(name, group, off, f"a similarity in {name}.tasks", only=fields)


def _has_scores(task: str) -> bool:
    return task not in TASKS or TASKS[task].kind == "similarity"  # unknown tasks are refused elsewhere


def _check_phases(config: TrainConfig) -> None:
    """Tasks have passes of their own in a sequential curriculum of several tasks alone."""
    mixing = config.curriculum.mixing
    if config.evaluation.every == "phase" and (mixing != "sequential" or len(config.tasks) < 2):
        raise ConfigError(
            "evaluation.every: phase evaluates between the passes of several tasks, found curriculum.mixing"
            f" {mixing} with tasks {', '.join(config.tasks)}; possible: epoch, or curriculum.mixing sequential with"
            " several tasks"
        )


def _refuse(path: str, group: Any, off: str, possible: str, only: tuple[str, ...] | None = None) -> None:
    """Raise ConfigError for the first of the group's fields (`only` these) that is not at its default."""
    for entry in dataclasses.fields(group):
        if only is not None and entry.name not in only:
            continue
        made = entry.default_factory
        default = entry.default if made is dataclasses.MISSING else made()
        found = getattr(group, entry.name)
        if found != default:
            raise ConfigError(
                f"{path}.{entry.name}: {found} would have no effect, because {off}; possible: {possible}, or"
                f" {path}.{entry.name} {default}"
            )
