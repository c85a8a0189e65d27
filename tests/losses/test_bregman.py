"""Bregman proximal point: the momentum teacher against explicit copies of the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.assembly import Assembly, assemble, tiny_config
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

from mtbert.data.packing import PackedBatch, pack, plan_passes
from mtbert.engine.forward import PackedForward, TrainingPass
from mtbert.errors import ConfigError
from mtbert.losses.bregman import BregmanConfig, BregmanObjective
from mtbert.losses.task_losses import LossConfig
from mtbert.model.dropout import DropoutRates, DropoutStream
from mtbert.model.heads import HeadConfig
from mtbert.model.lora import LoraConfig
from mtbert.model.multitask import MultiTaskModel
from mtbert.tasks.config import TaskConfig

TASKS = ["sst", "para", "sts"]
ROWS, MOMENTUM, WEIGHT = 4, 0.7, 2.0


def built(
    bert: Path, cache: Path, *, dropout: bool = False, alone: bool = False, **changes: object
) -> Assembly:
    rate = 0.2 if dropout else 0.0
    heads = {
        "sst": HeadConfig(dropout=rate),
        "para": HeadConfig(dropout=rate, pooling="pooler", pair=["concat", "difference"]),
        "sts": HeadConfig(dropout=rate, pooling="mean", pair=["cosine"], tower_layers=1),
    }
    loss = LossConfig(weight=0.0 if alone else 1.0)
    tasks = {n: TaskConfig(batch_size=ROWS, max_length=64, head=h, loss=loss) for n, h in heads.items()}
    bregman = BregmanConfig(TASKS, weight=WEIGHT, momentum=MOMENTUM)
    config = tiny_config(bert, cache, **{"task": tasks, "bregman": bregman, "max_tokens": 4096, **changes})
    config.model.dropout = DropoutRates(0.1, 0.1, 0.1) if dropout else DropoutRates(0.0, 0.0, 0.0)
    config.model.lora = LoraConfig(dropout=0.05 if dropout else 0.0)
    config.optim.lr = 1e-2
    return assemble(config, rows=20)


def plan_of(step: int) -> dict[str, np.ndarray]:
    return {name: np.arange(ROWS) + step + k for k, name in enumerate(TASKS)}


def objective_of(assembly: Assembly) -> BregmanObjective:
    (objective,) = assembly.step.objectives
    assert isinstance(objective, BregmanObjective)
    return objective


def trained(model: MultiTaskModel) -> Iterator[tuple[str, Tensor]]:
    return ((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad)


def train(assembly: Assembly, first: int, last: int) -> list[dict[str, Tensor]]:
    return [assembly.step(plan_of(step), step).objectives for step in range(first, last)]


def batch_of(assembly: Assembly, step: int) -> PackedBatch:
    data = {name: splits["train"] for name, splits in assembly.data.items()}
    (requests,) = plan_passes(plan_of(step), data, 4096)
    return pack(requests)


def by_definition(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weighted mean divergence of each task, example by example."""
    found = {}
    for task in TASKS:
        total = torch.zeros((), dtype=torch.float64)
        for p, q in zip(student[task], teacher[task], strict=True):
            if task == "sts":
                total = total + ((p - q) / 5).square().sum()
            else:
                family = Categorical if task == "sst" else Bernoulli
                one, other = family(logits=p), family(logits=q)
                total = total + (kl_divergence(one, other) + kl_divergence(other, one)).sum()
        found[f"{task}/bregman"] = WEIGHT * total / ROWS
    return found


def same(
    found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-10, atol: float = 1e-13
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("mode", ["full", "lora", "last-linear-layer"])
def test_loss_and_gradients_against_explicit_copies(tiny_bert: Path, tmp_path: Path, mode: str) -> None:
    assembly = built(tiny_bert, tmp_path, mode=mode)
    model = assembly.model
    slow = copy.deepcopy(model)
    for step in range(3):
        train(assembly, step, step + 1)
        with torch.no_grad():
            for (_, theirs), (_, ours) in zip(trained(slow), trained(model), strict=True):
                theirs.copy_(MOMENTUM * theirs + (1 - MOMENTUM) * ours)
    same(objective_of(assembly).teacher.state(), dict(trained(slow)))
    for task_loss in assembly.step.losses.values():
        task_loss.weight = 0.0
    batch = batch_of(assembly, 3)
    with torch.no_grad():
        targets = slow(batch, dtype=torch.float64)
    expected = by_definition(model(batch, dtype=torch.float64), targets)
    wanted = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(torch.stack(list(expected.values())).sum(), wanted, allow_unused=True)
    result = assembly.step.accumulate(plan_of(3), 3)
    rtol = 1e-5 if mode == "last-linear-layer" else 1e-8  # cached features are float32
    same(result.objectives, {name: loss.detach() for name, loss in expected.items()}, rtol)
    assert all(loss > 1e-6 for loss in result.objectives.values())
    for parameter, gradient in zip(wanted, gradients, strict=True):
        if gradient is None:
            assert parameter.grad is None or not parameter.grad.any()
        else:
            torch.testing.assert_close(parameter.grad, gradient, rtol=rtol, atol=rtol * 1e-2)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(
        p.grad is None and not p.requires_grad for p in objective_of(assembly).teacher.model.parameters()
    )


def test_the_teacher_drops_nothing(tiny_bert: Path, tmp_path: Path) -> None:
    assembly = built(tiny_bert, tmp_path, dropout=True, alone=True)
    batch, dropout = batch_of(assembly, 0), DropoutStream(assembly.config.seed, 0)
    with torch.no_grad():
        clean = assembly.model(batch, dtype=torch.float64)
        dropped = assembly.model(batch, dtype=torch.float64, dropout=dropout)
    same(assembly.step.accumulate(plan_of(0), 0).objectives, by_definition(dropped, clean))


def test_a_teacher_without_memory_holds_nothing_back(tiny_bert: Path, tmp_path: Path) -> None:
    bregman = BregmanConfig(TASKS, momentum=0.0)
    for losses in train(built(tiny_bert, tmp_path, bregman=bregman), 0, 2):
        assert all(loss == 0 for loss in losses.values())


def test_the_split_into_passes_changes_nothing(tiny_bert: Path, tmp_path: Path) -> None:
    whole, split = (built(tiny_bert, tmp_path, dropout=True, max_tokens=n) for n in (4096, 128))
    for found, expected in zip(train(split, 0, 2), train(whole, 0, 2), strict=True):
        same(found, expected, 1e-8)
    same(dict(trained(split.model)), dict(trained(whole.model)), 1e-7, 1e-9)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_restored_teacher_goes_on_bit_for_bit(tiny_bert: Path, tmp_path: Path, mode: str) -> None:
    first = built(tiny_bert, tmp_path, dropout=True, mode=mode)
    train(first, 0, 2)
    state = {name: value.clone() for name, value in first.step.state().items()}
    model = copy.deepcopy(first.model.state_dict())
    optimizer = copy.deepcopy(first.step.optimizer.state_dict())
    assert all(name.startswith("objective/bregman/") for name in state)
    expected = train(first, 2, 4)

    second = built(tiny_bert, tmp_path, dropout=True, mode=mode)
    second.model.load_state_dict(model)
    second.step.optimizer.load_state_dict(optimizer)
    second.step.restore(state)
    assert all(torch.equal(value, state[name]) for name, value in second.step.state().items())
    for found, losses in zip(train(second, 2, 4), expected, strict=True):
        assert all(torch.equal(found[name], loss) for name, loss in losses.items())
    for name, value in first.step.state().items():
        assert torch.equal(second.step.state()[name], value)


def test_frozen_tensors_are_shared_and_trained_ones_are_not(tiny_bert: Path, tmp_path: Path) -> None:
    assembly = built(tiny_bert, tmp_path, mode="lora")
    teacher = objective_of(assembly).teacher
    copies = dict(teacher.model.named_parameters())
    for name, parameter in assembly.model.named_parameters():
        assert (copies[name].data_ptr() == parameter.data_ptr()) == (not parameter.requires_grad), name
        assert (name in teacher.state()) == parameter.requires_grad, name
    assert any(name.endswith("lora_b") for name in teacher.state())
    with pytest.raises(ValueError, match=r"does not fit the model: heads\.sst\.output\.bias"):
        teacher.restore({n: v for n, v in teacher.state().items() if n != "heads.sst.output.bias"})


def test_without_dropout_a_bf16_run_compares_in_float32(tiny_bert: Path, tmp_path: Path) -> None:
    assembly = built(tiny_bert, tmp_path)
    train(assembly, 0, 1)
    state = objective_of(assembly).state()
    assembly.model.float()
    batch, losses = batch_of(assembly, 1), {}
    for dtype in (torch.bfloat16, torch.float32):
        objective = BregmanObjective(
            assembly.config.bregman, objective_of(assembly).divergences, assembly.model, dtype
        )
        objective.restore(state)
        forward, dropout = PackedForward(assembly.model, torch.device("cpu"), dtype), DropoutStream(0, 1)
        data = {name: splits["train"] for name, splits in assembly.data.items()}
        result = forward(plan_passes(plan_of(1), data, 4096)[0], dropout)
        run = TrainingPass(
            forward, result, dropout=dropout, segments=None, examples={}, shares=(), step=1, progress=0.0
        )
        losses[dtype] = objective.losses(run)
    assert batch.tokens == run.sub_batch(TASKS).tokens
    for task in TASKS:
        assert torch.equal(losses[torch.bfloat16][task], losses[torch.float32][task])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": 1.0}, "bregman.momentum: expected at least 0 and below 1, found 1.0"),
        ({"momentum": -0.1}, "bregman.momentum: expected at least 0 and below 1"),
        ({"momentum": float("nan")}, "bregman.momentum: expected at least 0 and below 1"),
        ({"weight": -1.0}, "bregman.weight: expected a number above 0, found -1.0"),
        ({"weight": 0.0}, "bregman.weight: expected a number above 0, found 0.0"),
    ],
)
def test_impossible_settings(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        BregmanConfig(**changes)


def test_unknown_tasks(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^bregman.tasks: 'cola' is not possible; possible: sst, para, sts"
    ):
        built(tiny_bert, tmp_path, bregman=BregmanConfig(["cola"]))
