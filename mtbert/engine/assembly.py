"""Everything that a training run is made of, built from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtbert.curriculum import Curriculum
from mtbert.data.tokenisation import Tokeniser
from mtbert.engine.build import (
    Machine,
    TaskSplits,
    build_forward,
    curriculum_of,
    load_model,
    prepare_data,
    prepare_machine,
    task_batches,
    tasks_of,
)
from mtbert.engine.compiled import CompiledParts
from mtbert.engine.distributed import ALONE, World
from mtbert.engine.effect import check_effect
from mtbert.engine.evaluator import Evaluator
from mtbert.engine.forward import Forward
from mtbert.engine.frozen_prefix import keep_tables
from mtbert.engine.graphs import use_graphs
from mtbert.engine.methods import build_train_step, sentence_quality, task_losses
from mtbert.engine.profiling import check_profile
from mtbert.engine.sense import check_sense
from mtbert.engine.step import TrainStep
from mtbert.model.multitask import MultiTaskModel
from mtbert.optim.unfreezing import Unfreezing
from mtbert.tasks.loading import load_tables
from mtbert.tasks.registry import Task

if TYPE_CHECKING:
    from mtbert.config import TrainConfig
    from mtbert.engine.shared import SharedParts


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    machine: Machine
    tasks: dict[str, Task]
    model: MultiTaskModel
    tokeniser: Tokeniser
    data: TaskSplits
    forward: Forward
    train_step: TrainStep
    curriculum: Curriculum
    unfreezing: Unfreezing | None
    evaluator: Evaluator
    graphs: str
    """Whether training steps are captured, or why not."""
    compiled: CompiledParts | None = None


def assemble(config: TrainConfig, world: World = ALONE, shared: SharedParts | None = None) -> Parts:
    """Build everything that a configuration asks for. Raises UserError for whatever is wrong with it.

    world: the processes that compute together; each builds its own. shared: what it has in common with other runs of
    this process.
    """
    check_effect(config)
    check_profile(config)
    machine = prepare_machine(config, world)
    tasks = tasks_of(config)
    read = load_tables if shared is None else shared.tables
    tables = read(config.data, list(tasks.values()), extra=config.extra_data)
    model, tokeniser = load_model(config, machine, shared)
    data = prepare_data(config, tables, tokeniser, shared)

    forward = build_forward(config, model, machine, shared)
    losses = task_losses(config, machine, data)
    train_step = build_train_step(config, machine, model, forward, losses, tables, data, tokeniser)
    quality = sentence_quality(config, machine, forward, tables, data, tokeniser)
    again_and_again = [*train_step.data.values(), *(splits["dev"] for splits in data.values())]
    keep_tables(forward, again_and_again if quality is None else [*again_and_again, quality.data])
    compiled = CompiledParts() if config.compile else None
    if compiled is not None:  # after the objectives have taken their copies of the model
        compiled.add_tasks(model, losses)
    batches = task_batches(config, data)
    curriculum = curriculum_of(config, batches)
    check_sense(config, model, curriculum)
    graphs = use_graphs(config, train_step, curriculum)
    evaluator = Evaluator(
        forward,
        tasks,
        data,
        losses,
        config.evaluation,
        max_tokens=config.max_tokens,
        seed=config.seed,
        trained_on={name: b.examples for name, b in batches.items()},
        quality=quality,
        world=world,
    )
    unfreezing = Unfreezing(model, config.unfreezing, config.epochs) if config.unfreezing.active else None
    return Parts(
        machine,
        tasks,
        model,
        tokeniser,
        data,
        forward,
        train_step,
        curriculum,
        unfreezing,
        evaluator,
        graphs,
        compiled,
    )
