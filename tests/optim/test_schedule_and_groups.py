"""The learning rate over time and the optimizer's groups."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from mtbert.errors import ConfigError
from mtbert.optim.adamw import OptimizerConfig, build_optimizer, parameter_groups
from mtbert.optim.schedule import ScheduleConfig, factor, set_learning_rate


def test_linear_schedule_warms_up_and_falls_to_nearly_zero() -> None:
    shares = [factor(ScheduleConfig("linear", 0.1), step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(1 / 11)
    assert max(shares) == 1.0
    assert shares.index(1.0) == 10
    assert shares[-1] == pytest.approx(1 / 90)
    assert all(a < b for a, b in pairwise(shares[:11]))
    assert all(a > b for a, b in pairwise(shares[10:]))


def test_cosine_is_half_way_down_in_the_middle_and_constant_stays() -> None:
    assert factor(ScheduleConfig("cosine", 0), 50, 100) == pytest.approx(0.5)
    assert factor(ScheduleConfig("constant", 5), 99, 100) == 1.0
    assert factor(ScheduleConfig("constant", 5), 0, 100) == pytest.approx(1 / 6)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
        self.heads = nn.ModuleDict({"sst": nn.Linear(3, 2)})


def test_biases_and_layer_norms_do_not_decay_and_heads_have_their_own_rate() -> None:
    model = Model()
    model.encoder[1].weight.requires_grad_(False)
    groups = parameter_groups(
        model.named_parameters(), OptimizerConfig(lr=1e-5, head_lr=1e-3, weight_decay=0.1)
    )
    found = {id(p): (g["peak_lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found[id(model.encoder[0].weight)] == (1e-5, 0.1)
    assert found[id(model.encoder[0].bias)] == (1e-5, 0.0)
    assert found[id(model.encoder[1].bias)] == (1e-5, 0.0)
    assert found[id(model.heads["sst"].weight)] == (1e-3, 0.1)
    assert found[id(model.heads["sst"].bias)] == (1e-3, 0.0)
    assert id(model.encoder[1].weight) not in found


def test_set_learning_rate_keeps_the_ratio_of_the_groups() -> None:
    optimizer = build_optimizer(Model(), OptimizerConfig(lr=1e-5, head_lr=1e-3))
    assert set_learning_rate(optimizer, 0.5) == pytest.approx(5e-4)
    assert {g["lr"] for g in optimizer.param_groups} == {5e-6, 5e-4}
    assert isinstance(optimizer, torch.optim.AdamW)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizer(Model().requires_grad_(False), OptimizerConfig())


@pytest.mark.parametrize(
    ("field", "value"), [("lr", 0.0), ("lr", float("nan")), ("beta1", 1.0), ("eps", 0.0), ("clip_norm", -1.0)]
)
def test_impossible_values_name_their_field(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"optim\.{field}"):
        OptimizerConfig(**{field: value})
