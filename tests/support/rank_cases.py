"""What the ranks of a test do: functions of a world, which is one process or one of several."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.assembly import Assembly, assemble
from torch import Tensor

from mtbert.config import TrainConfig
from mtbert.curriculum import Plan
from mtbert.engine.build import curriculum_of, tasks_of
from mtbert.engine.checkpoint import CheckpointStore
from mtbert.engine.distributed import World
from mtbert.engine.evaluator import Evaluator
from mtbert.engine.finish import predict_split
from mtbert.engine.metrics_log import MetricsLog
from mtbert.engine.mlm import MlmEvaluator, MlmForward, MlmStep
from mtbert.engine.mlm_run import build_mlm_model, mlm_data
from mtbert.engine.prepared_step import PreparedStep
from mtbert.engine.step_result import StepResult
from mtbert.engine.trainer import Trainer
from mtbert.errors import ConfigError, Interrupted, NonFiniteError
from mtbert.model.pretrained import resolve
from mtbert.optim.adamw import build_optimizer

STEPS = 2


def arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Copies of the tensors."""
    return {name: value.detach().numpy().copy() for name, value in tensors.items()}


def built(config: TrainConfig, world: World, losses: dict[str, float]) -> Assembly:
    """The assembly, with LoRA's B away from zero, and some tasks' loss weights set to values that no user may give."""
    assembly = assemble(config, world=world)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in assembly.model.named_parameters():
            if "lora_b" in name:
                parameter.normal_(0.0, 0.05, generator=generator)
    for task, weight in losses.items():
        assembly.step.losses[task].weight = weight
    return assembly


def steps(world: World, config: TrainConfig, plans: Sequence[Plan] | None, losses: dict[str, float]) -> Any:
    """Figures and gradients of each of some steps, and the weights and moments behind them."""
    assembly = built(config, world, losses)
    if plans is None:
        plans = [{name: b.batch(number) for name, b in assembly.batches.items()} for number in range(STEPS)]
    found: dict[str, Tensor] = {}
    tokens, reports = [], []
    for number, plan in enumerate(plans):
        result = assembly.step(plan, 3 + number, progress=number / len(plans))
        result.check()
        for kind, values in (("loss", result.losses), ("objective", result.objectives)):
            found |= {f"{number} {kind} {name}": value for name, value in values.items()}
        found |= {f"{number} total": result.total, f"{number} norm": result.grad_norm}
        for name, parameter in assembly.model.named_parameters():
            if parameter.grad is not None:
                found[f"{number} gradient {name}"] = parameter.grad.clone()
        tokens.append(result.tokens)
        reports.append(None if result.gradients is None else result.gradients.to_json())
    found |= {f"weight {name}": p.detach().clone() for name, p in assembly.model.named_parameters()}
    found |= {f"state {name}": value.clone() for name, value in assembly.step.state().items()}
    return arrays(found), tokens, reports


def scores(world: World, config: TrainConfig) -> Any:
    """An evaluation and the predictions of a table."""
    assembly = assemble(config, dtype=torch.float32, world=world)
    tasks = tasks_of(config)
    evaluator = Evaluator(
        assembly.forward,
        tasks,
        assembly.data,
        assembly.losses,
        config.evaluation,
        max_tokens=config.max_tokens,
        seed=config.seed,
        world=world,
    )
    outputs = {
        name: predict_split(
            assembly.forward, task, assembly.data[name]["dev"], "dev", max_tokens=128, world=world
        ).outputs
        for name, task in tasks.items()
    }
    return evaluator.evaluate().to_json(), outputs


def masked_words(world: World, config: TrainConfig) -> Any:
    """A step of masked-language modelling, and an evaluation."""
    folder = resolve(config.model.pretrained)
    data = mlm_data(config, folder)
    model = build_mlm_model(config, folder, data).double()
    forward = MlmForward(model, torch.device("cpu"), torch.float64)
    optimizer = build_optimizer(model, config.optim)
    options = {"max_tokens": config.max_tokens, "world": world}
    step = MlmStep(forward, optimizer, data, clip_norm=1.0, seed=config.seed, **options)
    result = step({"mlm": np.arange(9)}, 2)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    evaluation = MlmEvaluator(forward, data, **options).evaluate()
    found |= {"loss": result.total, "norm": result.grad_norm}
    return arrays(found), result.tokens, evaluation.to_json()


def spoiled(world: World, config: TrainConfig, task: str) -> Any:
    """What a step says whose only culprit is the last example of a task, and whether the weights are as before."""
    assembly = assemble(config, dtype=torch.float32, world=world)
    plan = {name: batches.batch(0) for name, batches in assembly.batches.items()}
    culprit = plan[task][-1]
    labels = assembly.data[task]["train"].labels
    assert labels is not None
    labels[culprit] = float("nan")
    before = {name: value.clone() for name, value in assembly.model.state_dict().items()}
    result = assembly.step(plan, 0)
    try:
        result.check()
        message = ""
    except NonFiniteError as error:
        message = str(error)
    same = all(torch.equal(value, before[name]) for name, value in assembly.model.state_dict().items())
    return message, same, assembly.data[task]["train"].ids[culprit]


def trained(world: World, config: TrainConfig, run: Path, stop_after: int | None = None) -> Any:
    """The training in the folder `run`, from its newest checkpoint or its start.

    stop_after: the step in which the last rank, and it alone, is asked to stop by a signal.
    """
    assembly = assemble(config, world=world)
    evaluator = Evaluator(
        assembly.forward,
        tasks_of(config),
        assembly.data,
        assembly.losses,
        config.evaluation,
        max_tokens=config.max_tokens,
        seed=config.seed,
        world=world,
    )
    curriculum = curriculum_of(config, assembly.batches)
    trainer = Trainer(
        assembly.model,
        assembly.step,
        curriculum,
        evaluator,
        CheckpointStore(run / "checkpoints"),
        MetricsLog(run / "metrics.jsonl") if world.is_main else None,
        schedule=config.schedule,
        evaluation=config.evaluation,
        run=config.run,
        inputs=config.input,
        device=torch.device("cpu"),
        fingerprint={"data": "the same", "environment": {"ranks": world.size}},
        world=world,
    )
    train = trainer.train_step.run

    def run_step(ready: PreparedStep, progress: float) -> StepResult:
        if ready.step + 1 == stop_after and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(ready, progress)

    trainer.train_step.run = run_step  # type: ignore[method-assign]
    trainer.resume()
    end = "finished"
    try:
        trainer.fit()
    except Interrupted as stopped:
        end = str(stopped)
    found = dict(assembly.model.state_dict()) | trainer.train_step.state()
    return arrays(found), end, trainer.progress.step, trainer.progress.best_score


def messages(world: World) -> Any:
    """One exchange of each kind."""
    try:
        world.check_same({"the settings": "equal", "the tables": "odd" if world.rank == 1 else "equal"})
        odd = ""
    except ConfigError as error:
        odd = str(error)
    return {
        "told": world.told(lambda: {"text": "é", "from": world.rank}),
        "gathered": world.gathered(list(range(world.rank))),
        "any": [world.any(world.rank == world.size - 1), world.any(False)],
        "shares": sorted(number for share in world.gathered([*world.share_of(7)]) for number in share),
        "odd": odd,
    }
