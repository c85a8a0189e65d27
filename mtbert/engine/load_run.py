"""A trained run, ready to compute: its configuration, its best weights, its tokeniser."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mtbert.config import TrainConfig
from mtbert.data.tokenisation import Tokeniser
from mtbert.engine.build import Machine, load_model, machine_of, tasks_of
from mtbert.engine.export import is_exported
from mtbert.engine.finish import load_best_weights
from mtbert.engine.forward import PackedForward
from mtbert.engine.precision import Precision, precision_elsewhere, resolve_device, resolve_precision
from mtbert.engine.run_folder import RunFolder
from mtbert.errors import ConfigError
from mtbert.model.multitask import MultiTaskModel
from mtbert.model.pretrained import ENCODER_FOLDER
from mtbert.tasks.registry import Task


@dataclass(frozen=True)
class LoadedRun:
    """What prediction and evaluation need of a run."""

    run: RunFolder
    config: TrainConfig
    tasks: dict[str, Task]
    machine: Machine
    model: MultiTaskModel
    tokeniser: Tokeniser
    forward: PackedForward
    step: int
    """The step of the checkpoint whose weights are loaded."""


def load_run(
    run: RunFolder, config: TrainConfig, *, device: str | None = None, precision: Precision | None = None
) -> LoadedRun:
    """Load the best checkpoint of a run, without gradients. Raises UserError for a folder that holds none.

    precision: by default that of the training. Nothing of the process is changed: neither threads nor kernels.
    """
    if config.seeds > 1:
        raise ConfigError(
            f"{run.path} holds the runs of {config.seeds} seeds; name one of them, like"
            f" {run.path / f'seed-{config.seed}'}"
        )
    if is_exported(run.path):  # then nothing beyond the run's own folder is needed
        exported = dataclasses.replace(config.model, pretrained=str(run.path / ENCODER_FOLDER))
        config = dataclasses.replace(config, model=exported)
    if run.is_mlm:
        raise ConfigError(
            f"{run.path} is masked-language modelling, which trains no task; its encoder is {run.path / ENCODER_FOLDER}"
        )
    # The machine of the training need not be this one.
    place = resolve_device(device or "auto")
    precision = resolve_precision(precision or precision_elsewhere(config.precision, place), place)
    # Its cache need not be a place to write on this machine, and its checkpoint has what an adapter began with.
    model_config = dataclasses.replace(config.model, adapter=None)
    config = dataclasses.replace(
        config, device=str(place), threads=0, precision=precision, cache=None, model=model_config
    )
    machine = machine_of(place, precision)
    model, tokeniser = load_model(config, machine)
    step = load_best_weights(model, run.checkpoints)
    # No table is read often enough here to keep a frozen encoder's features of it.
    forward = PackedForward(model, machine.device, machine.dtype)
    model.eval().requires_grad_(False)
    return LoadedRun(run, config, tasks_of(config), machine, model, tokeniser, forward, step)
