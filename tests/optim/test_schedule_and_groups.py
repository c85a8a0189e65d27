"""The learning rate over time and the optimizer's groups."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from mtbert.errors import ConfigError
from mtbert.optim.adamw import OptimizerConfig, build_optimizer, parameter_groups
from mtbert.optim.schedule import ScheduleConfig, factor, move_learning_rates, set_learning_rate


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


def howard_and_ruder(t: int, total: int, cut_frac: float, ratio: float = 32) -> float:
    """Equation 3 of ULMFiT, word for word, with a peak of 1."""
    cut = int(total * cut_frac)
    p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
    return (1 + p * (ratio - 1)) / ratio


@pytest.mark.parametrize(("total", "cut_frac"), [(100, 0.1), (1000, 0.06), (40, 0.5)])
def test_slanted_triangular_follows_its_equation(total: int, cut_frac: float) -> None:
    shares = [factor(ScheduleConfig("slanted-triangular", cut_frac), step, total) for step in range(total)]
    assert shares == pytest.approx([howard_and_ruder(t, total, cut_frac) for t in range(total)])
    assert shares[0] == 1 / 32
    assert shares.index(1.0) == round(cut_frac * total)


def test_slanted_triangular_takes_steps_and_stays_above_its_floor() -> None:
    assert factor(ScheduleConfig("slanted-triangular", 25), 25, 100) == 1.0
    assert factor(ScheduleConfig("slanted-triangular", 0), 0, 100) == 1.0
    for warmup, total in ((0.1, 105), (500, 100), (0.9, 1)):
        shares = [factor(ScheduleConfig("slanted-triangular", warmup), step, total) for step in range(total)]
        assert all(1 / 32 <= share <= 1 for share in shares)


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


class Layered(nn.Module):
    """The names of a model with three encoder layers, the middle one with an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.embeddings = nn.Linear(3, 3)
        self.encoder.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.encoder.layers[1].lora_a = nn.Parameter(torch.zeros(2, 3))
        self.encoder.layers[1].lora_b = nn.Parameter(torch.zeros(3, 2))
        self.encoder.pooler = nn.Linear(3, 3)
        self.heads = nn.ModuleDict({"sst": nn.Linear(3, 2)})


def rates(model: nn.Module, config: OptimizerConfig) -> dict[str, float]:
    found = {
        id(p): g["peak_lr"] for g in parameter_groups(model.named_parameters(), config) for p in g["params"]
    }
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


def test_learning_rates_fall_from_layer_to_layer() -> None:
    """Equation 1: the top of three layers has the full rate, the embeddings that of layer 0."""
    found = rates(Layered(), OptimizerConfig(lr=8e-5, head_lr=1e-3, layer_decay=0.5))
    expected = {"embeddings": 1e-5, "layers.0": 2e-5, "layers.1": 4e-5, "layers.2": 8e-5, "pooler": 8e-5}
    for name, rate in found.items():
        part = next((part for part in expected if f"encoder.{part}." in name), None)
        assert rate == pytest.approx(1e-3 if part is None else expected[part])
    assert len(found) == len(list(Layered().parameters()))


def test_frozen_layers_count_as_layers() -> None:
    model = Layered()
    model.encoder.layers[2].requires_grad_(False)
    found = rates(model, OptimizerConfig(lr=8e-5, layer_decay=0.5))
    assert found["encoder.layers.1.weight"] == pytest.approx(4e-5)


def test_lora_plus_raises_the_rate_of_b() -> None:
    found = rates(Layered(), OptimizerConfig(lr=1e-5, lora_plus_ratio=16, layer_decay=0.5))
    assert found["encoder.layers.1.lora_a"] == pytest.approx(0.5e-5)
    assert found["encoder.layers.1.lora_b"] == pytest.approx(16 * 0.5e-5)
    assert found["heads.sst.weight"] == pytest.approx(1e-5)


def test_groups_are_one_a_rate_and_decay_in_the_order_of_the_parameters() -> None:
    model = Layered()
    config = OptimizerConfig(lr=1e-5, layer_decay=0.5)
    groups = parameter_groups(model.named_parameters(), config)
    keys = [(g["peak_lr"], g["weight_decay"]) for g in groups]
    assert len(set(keys)) == len(keys) == 2 * 4
    assert groups == parameter_groups(model.named_parameters(), config)
    first = {id(p): place for place, p in enumerate(model.parameters())}
    places = [first[id(g["params"][0])] for g in groups]
    assert places == sorted(places)
    assert len(parameter_groups(model.named_parameters(), OptimizerConfig())) == 2


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (OptimizerConfig(layer_decay=0.9), "layer_decay"),
        (OptimizerConfig(lora_plus_ratio=16), "lora_plus_ratio"),
    ],
)
def test_rates_of_what_is_not_trained_are_refused(config: OptimizerConfig, field: str) -> None:
    model = Layered()
    model.encoder.requires_grad_(False)
    with pytest.raises(ConfigError, match=rf"^optim\.{field}: no .* possible: 1"):
        build_optimizer(model, config)


def test_set_learning_rate_keeps_the_ratio_of_the_groups() -> None:
    optimizer = build_optimizer(Model(), OptimizerConfig(lr=1e-5, head_lr=1e-3))
    assert set_learning_rate(optimizer, 0.5) == pytest.approx(5e-4)
    assert {g["lr"] for g in optimizer.param_groups} == {5e-6, 5e-4}
    assert isinstance(optimizer, torch.optim.AdamW)


def test_learning_rates_on_the_device_train_as_those_on_the_host() -> None:
    torch.manual_seed(0)
    models = [Model(), Model()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(model, OptimizerConfig(lr=2**-10, head_lr=2**-7)) for model in models]
    move_learning_rates(optimizers[1], torch.device("cpu"))
    held = [group["lr"] for group in optimizers[1].param_groups]
    assert len(held) > 2
    for share in (1.0, 0.5, 0.25):
        assert len({set_learning_rate(optimizer, share) for optimizer in optimizers}) == 1
        for model, optimizer in zip(models, optimizers, strict=True):
            for place, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full_like(parameter, 1.0 + place)
            optimizer.step()
        for mine, twin in zip(models[1].parameters(), models[0].parameters(), strict=True):
            torch.testing.assert_close(mine, twin, rtol=1e-6, atol=1e-8)
        for group, before in zip(optimizers[1].param_groups, held, strict=True):
            assert group["lr"] is before, "where a captured step reads it"
            assert float(before) == group["peak_lr"] * share


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizer(Model().requires_grad_(False), OptimizerConfig())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("lr", float("nan")),
        ("beta1", 1.0),
        ("eps", 0.0),
        ("clip_norm", -1.0),
        ("layer_decay", 0.0),
        ("layer_decay", 1.1),
        ("lora_plus_ratio", 0.0),
        ("lora_plus_ratio", float("inf")),
    ],
)
def test_impossible_values_name_their_field(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"optim\.{field}"):
        OptimizerConfig(**{field: value})
