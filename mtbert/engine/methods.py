"""From the configuration to the training step: task losses, objectives, surgery and the regularisers of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mtbert.data.tokenisation import Tokeniser, tokenise
from mtbert.engine.build import Machine, TaskSplits, TaskTables, loss_scaler, tasks_of, token_cache
from mtbert.engine.evaluator import dev_sample
from mtbert.engine.forward import Forward
from mtbert.engine.inference import labels_of
from mtbert.engine.sentence_quality import SentenceQuality
from mtbert.engine.step import TrainStep
from mtbert.errors import ConfigError
from mtbert.losses.bregman import build_bregman
from mtbert.losses.cosine_embedding import CosineEmbedding, build_cosine_embedding
from mtbert.losses.mnrl import build_mnrl
from mtbert.losses.objective import Objective, ObjectiveContext
from mtbert.losses.pairs import EmbeddingObjective
from mtbert.losses.simcse import build_simcse
from mtbert.losses.smart import build_smart
from mtbert.losses.task_losses import TaskLoss
from mtbert.losses.triplet import build_triplet
from mtbert.model.multitask import MultiTaskModel
from mtbert.optim.adamw import build_optimizer
from mtbert.optim.mixout import build_mixout
from mtbert.optim.pretrained_decay import PretrainedDecay
from mtbert.optim.surgery import Surgery, UncertaintyWeights

if TYPE_CHECKING:
    from mtbert.config import TrainConfig


def task_losses(config: TrainConfig, machine: Machine, data: TaskSplits) -> dict[str, TaskLoss]:
    """The loss of each task, on the device; balanced class weights are those of the whole training table."""
    return {
        name: TaskLoss(task, config.task[name].loss, labels_of(data[name]["train"])).to(machine.device)
        for name, task in tasks_of(config).items()
    }


def build_objectives(config: TrainConfig, context: ObjectiveContext) -> list[Objective]:
    """The objectives that the configuration switches on. Raises ConfigError for one that cannot work on this data."""
    built: list[Objective | None] = [
        build_simcse(config.simcse, context),
        build_mnrl(config.mnrl, context),
        build_cosine_embedding(config.cosine_embedding, context),
        build_triplet(config.triplet, context),
        build_smart(config.smart, context),
        build_bregman(config.bregman, context),
    ]
    objectives = [objective for objective in built if objective is not None]
    _check_passes(config, objectives, context)
    return objectives


def _check_passes(config: TrainConfig, objectives: Sequence[Objective], context: ObjectiveContext) -> None:
    """Every example of an objective must fit into a pass; where rows are compared in the batch, two of them."""
    for objective in objectives:
        if not isinstance(objective, EmbeddingObjective):
            continue
        together = 1 if isinstance(objective, CosineEmbedding) else 2
        for task, source in objective.sources.items():
            data = context.data[task] if source.data is None else source.data
            needed = together * int(data.lengths.max(initial=0))
            if needed > config.max_tokens:
                raise ConfigError(
                    f"max_tokens: {objective.name} needs {together} example(s) of {data.name} in a pass, up to {needed}"
                    f" tokens, but one pass may hold {config.max_tokens}; raise max_tokens or lower {task}.max_length"
                )


def build_train_step(
    config: TrainConfig,
    machine: Machine,
    model: MultiTaskModel,
    forward: Forward,
    losses: Mapping[str, TaskLoss],
    tables: TaskTables,
    data: TaskSplits,
    tokeniser: Tokeniser,
) -> TrainStep:
    """The training step with its optimizer. `model` must hold the pretrained weights: regularisers remember them."""
    train = {name: splits["train"] for name, splits in data.items()}
    cache = token_cache(config)
    context = ObjectiveContext(
        tasks=tasks_of(config),
        task_configs=config.task,
        tables=tables,
        tokenised={name: tokenise(tables[name]["train"], tokeniser, cache) for name in train},
        data=train,
        model=model,
        mode=config.mode,
        seed=config.seed,
        device=machine.device,
        dtype=machine.dtype,
    )
    objectives = build_objectives(config, context)
    for objective in objectives:  # before the optimizer: a stream may be the first to need the pooler
        for stream, pooling in objective.poolings().items():
            model.add_stream(stream, pooling)
    uncertainty = model.uncertainty
    assert uncertainty is None or isinstance(uncertainty, UncertaintyWeights)
    encoder = [(name, p) for name, p in model.encoder.named_parameters() if p.requires_grad]
    return TrainStep(
        forward,
        build_optimizer(model, config.optim),
        losses,
        train,
        max_tokens=config.max_tokens,
        clip_norm=config.optim.clip_norm,
        seed=config.seed,
        objectives=objectives,
        surgery=Surgery(config.surgery, tuple(train), config.seed)
        if config.surgery.needs_task_gradients
        else None,
        uncertainty=uncertainty,
        mixout=build_mixout(config.mixout, model, config.seed),
        pretrained_decay=PretrainedDecay(encoder, config.optim.pretrained_decay)
        if config.optim.pretrained_decay
        else None,
        scaler=loss_scaler(machine),
        world=machine.world,
    )


def sentence_quality(
    config: TrainConfig,
    machine: Machine,
    forward: Forward,
    tables: TaskTables,
    data: TaskSplits,
    tokeniser: Tokeniser,
) -> SentenceQuality | None:
    """What measures alignment and uniformity at evaluations; None without an objective on embeddings.

    Measured are the dev sentences of sts where the run has it, else of the objective's first task.
    """
    groups = (config.simcse, config.mnrl, config.cosine_embedding, config.triplet)
    active = [group for group in groups if group.tasks]
    if not active:
        return None
    name = "sts" if "sts" in config.tasks else active[0].tasks[0]
    settings = config.task[name]
    return SentenceQuality(
        forward,
        tasks_of(config)[name],
        tokenise(tables[name]["dev"], tokeniser, token_cache(config)),
        dev_sample(data[name]["dev"], config.evaluation.selection),
        pooling=active[0].pooling,
        max_length=settings.max_length,
        truncate=settings.truncate,
        max_tokens=config.max_tokens,
        world=machine.world,
    )
