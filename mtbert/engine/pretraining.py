"""What stands before the run itself: masked-language modelling on the tasks' own sentences, then one task alone."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mtbert.engine.build import Machine, load_model
from mtbert.engine.checkpoint import CheckpointStore
from mtbert.engine.distributed import ALONE, World
from mtbert.engine.export import export_encoder, is_exported
from mtbert.engine.finish import load_best_weights
from mtbert.engine.mlm import NAME as MLM
from mtbert.engine.mlm_run import run_mlm
from mtbert.engine.run_folder import RunFolder, begun_run, new_run
from mtbert.errors import ConfigError
from mtbert.evaluation.history import History, read_history
from mtbert.evaluation.metrics import TaskScores
from mtbert.model.build import ModelConfig
from mtbert.model.pretrained import ENCODER_FOLDER
from mtbert.optim.adamw import OptimizerConfig
from mtbert.tasks.config import TaskConfig
from mtbert.tasks.extra_data import extra_of_tasks
from mtbert.tasks.registry import TASKS

if TYPE_CHECKING:
    from mtbert.config import TrainConfig

logger = logging.getLogger(__name__)


STAGES_FOLDER = "pretraining"
"""Where a run keeps the runs before it."""


@dataclass
class PretrainingConfig:
    """Further pretraining before the run: first masked-language modelling, then one task alone."""

    mlm_epochs: float = 0.0
    """Passes of masked-language modelling over the sentences of the training tables; 0: none."""
    mlm_lr: float = 5e-5
    """Its peak learning rate."""
    mlm_batch_tokens: int = 4096
    """Tokens of one of its steps, on average."""
    mlm_probability: float = 0.15
    """Share of the tokens that are hidden and to be guessed."""
    task: str | None = None
    """A task to train alone before all others (Phang et al. 2018), with its own settings and those of `optim`; the run
    goes on from its encoder, and from its head where the run has this task, too."""
    task_epochs: float = 1.0
    """Passes over that task's training table."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mlm_epochs) and self.mlm_epochs >= 0):
            raise ConfigError(f"pretraining.mlm_epochs: expected at least 0, found {self.mlm_epochs}")
        if not 0 < self.mlm_lr < 1e3:
            raise ConfigError(
                f"pretraining.mlm_lr: expected a number above 0 and below 1000, found {self.mlm_lr}"
            )
        if self.mlm_batch_tokens < 1:
            raise ConfigError(
                f"pretraining.mlm_batch_tokens: expected at least 1, found {self.mlm_batch_tokens}"
            )
        if not 0 < self.mlm_probability < 1:
            raise ConfigError(
                f"pretraining.mlm_probability: expected a number above 0 and below 1, found {self.mlm_probability}"
            )
        if self.task is not None and self.task not in TASKS:
            raise ConfigError(f"pretraining.task: unknown task {self.task!r}; possible: {', '.join(TASKS)}")
        if not (math.isfinite(self.task_epochs) and self.task_epochs > 0):
            raise ConfigError(f"pretraining.task_epochs: expected a number above 0, found {self.task_epochs}")

    @property
    def active(self) -> bool:
        """Whether there is anything to do before the run."""
        return self.mlm_epochs > 0 or self.task is not None


class Train(Protocol):
    """What trains one run; `mtbert.train.train`."""

    def __call__(
        self, config: TrainConfig, run: RunFolder, *, resumed: bool = ..., world: World = ...
    ) -> None:
        """Train in `run`, from its start or from its newest checkpoint."""


@dataclass(frozen=True)
class Stage:
    """One run before the run."""

    name: str
    """`mlm`, or the task's name."""
    folder: Path
    config: TrainConfig

    @property
    def done(self) -> bool:
        """Whether its encoder is there."""
        return is_exported(self.folder)

    @property
    def encoder(self) -> Path:
        """Where its encoder is, or will be."""
        return self.folder / ENCODER_FOLDER


def stages(config: TrainConfig, folder: Path) -> list[Stage]:
    """The runs that `config` asks for before the run in `folder`, in their order. Raises ConfigError.

    They have the run's data, seed, machine and evaluation. They train the whole plain encoder: adapters, variants that
    a `BertModel` has no place for, objectives and surgery are the run's own. They do not stop early, and what follows
    goes on from the checkpoint that is best on dev (of masked words: on the sentences held out).
    """
    settings, planned = config.pretraining, []
    start = config.model.pretrained

    def add(name: str, **changes: Any) -> str:
        model = ModelConfig(
            pretrained=start,
            dropout=config.model.dropout,
            attention_heads=config.model.attention_heads,
            pool_layer=config.model.pool_layer,
        )
        machine = (
            "precision",
            "max_tokens",
            "checkpointing",
            "input",
            "device",
            "threads",
            "kernels",
            "compile",
            "profile",
            "profiling",
        )
        kept = ("data", "seed", "cache", "plugins", *machine)
        own = type(config)(
            **{field: getattr(config, field) for field in kept},
            model=model,
            optim=replace(config.optim, lora_plus_ratio=1.0, uncertainty_lr=OptimizerConfig.uncertainty_lr),
            schedule=config.schedule,
            evaluation=replace(
                config.evaluation,
                patience=0,
                every="epoch" if config.evaluation.every == "phase" else config.evaluation.every,
            ),
            run=config.run,
            **changes,
        )
        planned.append(Stage(name, folder / STAGES_FOLDER / name, own))
        return str(planned[-1].encoder)

    if settings.mlm_epochs > 0:
        start = add(
            MLM,
            tasks=list(config.tasks),
            extra_data=extra_of_tasks(config.extra_data, config.tasks),
            task=dict(config.task),
            pretraining=replace(settings, task=None),
            graphs="never",  # every step hides another number of tokens
        )
    if settings.task is not None:
        task = config.task.get(settings.task, TaskConfig())
        task = replace(task, loss=replace(task.loss, weight=task.loss.weight or 1.0))
        add(
            settings.task,
            tasks=[settings.task],
            extra_data=extra_of_tasks(config.extra_data, [settings.task]),
            task={settings.task: task},
            epochs=settings.task_epochs,
            graphs=config.graphs,
        )
    return planned


def check_stages(config: TrainConfig, folder: Path, assemble: Callable[[TrainConfig], object]) -> None:
    """Build what the stages that are still to come train, so that none fails after another has run for an hour.

    assemble: builds everything that a configuration asks for (`mtbert.engine.assembly.assemble`).
    """
    for stage in stages(config, folder):
        if stage.name != MLM and not stage.done:
            model = replace(stage.config.model, pretrained=config.model.pretrained)
            try:
                assemble(replace(stage.config, model=model))
            except ConfigError as error:
                raise ConfigError(f"in the stage {stage.name} before the run: {error}") from error


def run_pretraining(config: TrainConfig, run: RunFolder, train: Train, world: World = ALONE) -> TrainConfig:
    """Run what stands before the run, in RUN/pretraining/NAME; returns the configuration that the run goes on with.

    A finished stage is skipped, an interrupted one resumed. Of a finished one its encoder and its best checkpoint are
    kept. The configuration in RUN/config.yaml stays `config`: it repeats all of it, and the run's own checkpoints need
    no stage to be read. The ranks of `world` train each stage together; all must see the folder of the run.
    """
    planned = stages(config, run.path)
    for stage in planned:
        if not world.told(functools.partial(is_exported, stage.folder)):
            _run(stage, train, world)
        if world.is_main:
            _tidy(stage.folder / "checkpoints")
    model = replace(config.model, pretrained=str(planned[-1].encoder)) if planned else config.model
    return replace(
        config,
        model=model,
        pretraining=PretrainingConfig(),
        extra_data=extra_of_tasks(config.extra_data, config.tasks),
    )


def describe_stages(config: TrainConfig, folder: Path) -> list[dict[str, Any]]:
    """What each stage came to and cost, for the run's record: its best score, training seconds and tokens."""
    described = []
    for stage in stages(config, folder):
        metrics = stage.folder / "metrics.jsonl"
        history = read_history(metrics) if metrics.is_file() else History()
        best, end = history.best_evaluation(), history.epochs[-1] if history.epochs else None
        if best is None or end is None:  # somebody has cleared the folder and left the encoder
            continue
        described.append(
            {
                "stage": stage.name,
                "step": best["step"],
                "score": TaskScores.from_json(best["dev"][stage.name]).headline,
                **({"perplexity": best["perplexity"]} if "perplexity" in best else {}),
                "seconds": end["seconds"],
                "tokens": end["tokens"],
            }
        )
    return described


def _run(stage: Stage, train: Train, world: World) -> None:
    with contextlib.ExitStack() as stack:
        begun = world.told(lambda: (stage.folder / "config.yaml").is_file())
        if begun:
            run = stack.enter_context(begun_run(world, stage.folder))
        else:
            run, _ = stack.enter_context(new_run(world, stage.folder, ""))
        if stage.name == MLM:
            run_mlm(stage.config, run, resumed=begun, world=world)
            return
        train(stage.config, run, resumed=begun, world=world)
        world.told(lambda: _export(stage, run))


def _export(stage: Stage, run: RunFolder) -> None:
    model, _ = load_model(stage.config, Machine(torch.device("cpu"), torch.float32))
    load_best_weights(model, run.checkpoints)
    export_encoder(model.encoder, stage.folder, pretrained=stage.config.model.pretrained, heads_of=model)


def _tidy(checkpoints: Path) -> None:
    """Delete all checkpoints but the best."""
    entries = list(checkpoints.iterdir()) if checkpoints.is_dir() else []
    best = CheckpointStore(checkpoints).load_best(logger.warning) if len(entries) > 1 else None
    for entry in entries:
        if best is not None and entry.name != best.path.name:
            shutil.rmtree(entry, ignore_errors=True)
