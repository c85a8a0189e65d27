"""Which parameters train at which epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtbert.errors import ConfigError
from mtbert.model import HeadConfig, HeadSpec, LoraConfig, MultiTaskModel, add_lora, build_heads, load_encoder
from mtbert.optim.adamw import OptimizerConfig, build_optimizer
from mtbert.optim.unfreezing import Unfreezing, UnfreezingConfig


def make(folder: Path, mode: str = "full", pair: list[str] | None = None) -> MultiTaskModel:
    """Two layers, one head that pools through the pooler."""
    encoder = load_encoder(folder)
    if mode == "lora":
        add_lora(encoder, LoraConfig(rank=2), torch.Generator().manual_seed(0))
    spec = HeadSpec("sts", 1, pair=True, score_range=(0.0, 5.0))
    config = HeadConfig(pair=pair or ["concat"], pooling="pooler")  # type: ignore[arg-type]
    model = MultiTaskModel(encoder, build_heads([spec], {"sts": config}, encoder.config.hidden_size))
    model.set_mode(mode)
    return model


def part_of(name: str) -> str:
    words = name.split(".")
    return ".".join(words[1:3]) if words[1] == "layers" else words[0] if words[0] == "heads" else words[1]


def training(model: MultiTaskModel) -> set[str]:
    """The parts that train; a part must train as a whole or not at all (adapters aside)."""
    parts: dict[str, set[bool]] = {}
    for name, parameter in model.named_parameters():
        if model.mode == "full" or ".lora_" in name or name.startswith("heads."):
            parts.setdefault(part_of(name), set()).add(parameter.requires_grad)
        else:
            assert not parameter.requires_grad
    assert all(len(found) == 1 for found in parts.values())
    return {part for part, found in parts.items() if True in found}


ALL = {"heads", "pooler", "layers.1", "layers.0", "embeddings"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            UnfreezingConfig(gradual=True),
            {0: ALL - {"layers.0", "embeddings"}, 0.99: ALL - {"layers.0", "embeddings"}}
            | {1: ALL - {"embeddings"}, 1.5: ALL - {"embeddings"}, 2: ALL, 7.3: ALL},
        ),
        (
            UnfreezingConfig(gradual=True, epochs_per_layer=0.1, heads_first=0.2),
            {0: {"heads"}, 0.19: {"heads"}, 0.2: ALL - {"layers.0", "embeddings"}}
            | {0.1 * 3: ALL - {"embeddings"}, 0.4: ALL},
        ),
        (UnfreezingConfig(heads_first=1.5), {0: {"heads"}, 1.49: {"heads"}, 1.5: ALL, 2: ALL}),
    ],
)
def test_what_trains_is_a_function_of_the_epoch(
    tiny_bert: Path, config: UnfreezingConfig, expected: dict[float, set[str]]
) -> None:
    assert config.active
    model = make(tiny_bert)
    unfreezing = Unfreezing(model, config, 100)
    now = training(model)
    for epoch in [*expected, *reversed(expected)]:
        changed = unfreezing.apply(epoch)
        assert training(model) == expected[epoch]
        assert changed == (now != expected[epoch])
        now = expected[epoch]


def test_what_the_mode_freezes_stays_frozen(tiny_bert: Path) -> None:
    model = make(tiny_bert, "lora")
    unfreezing = Unfreezing(model, UnfreezingConfig(heads_first=1), 100)
    unfreezing.apply(0)
    assert training(model) == {"heads"}
    unfreezing.apply(1)
    assert training(model) == {"heads", "layers.0", "layers.1"}
    assert not model.encoder.embeddings.word.requires_grad


def test_an_optimizer_of_all_parameters_moves_the_unfrozen_ones_only(tiny_bert: Path) -> None:
    model = make(tiny_bert)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3, weight_decay=0.1))
    unfreezing = Unfreezing(model, UnfreezingConfig(gradual=True, heads_first=1), 100)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    unfreezing.apply(1)
    torch.stack([p.sum() for p in model.parameters()]).sum().backward()
    optimizer.step()
    moved = {part_of(n) for n, p in model.named_parameters() if not torch.equal(p.detach(), before[n])}
    still = {part_of(n) for n, p in model.named_parameters() if torch.equal(p.detach(), before[n])}
    assert moved == {"heads", "pooler", "layers.1"}
    assert still == {"layers.0", "embeddings"}


@pytest.mark.parametrize(
    ("mode", "config", "message"),
    [
        ("lora", UnfreezingConfig(gradual=True), r"^unfreezing\.gradual: .* full only, the mode is lora"),
        (
            "last-linear-layer",
            UnfreezingConfig(gradual=True),
            r"^unfreezing\.gradual: .* last-linear-layer",
        ),
        ("last-linear-layer", UnfreezingConfig(heads_first=1), r"^unfreezing\.heads_first: .* possible: 0"),
    ],
)
def test_modes_with_nothing_to_unfreeze(
    tiny_bert: Path, mode: str, config: UnfreezingConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Unfreezing(make(tiny_bert, mode), config, 100)


def test_heads_without_parameters_cannot_come_first(tiny_bert: Path) -> None:
    with pytest.raises(ConfigError, match=r"^unfreezing\.heads_first: the heads have no parameters"):
        Unfreezing(make(tiny_bert, pair=["cosine"]), UnfreezingConfig(heads_first=1), 100)


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs_per_layer", 0.0), ("epochs_per_layer", float("nan")), ("heads_first", -1.0)],
)
def test_impossible_values_name_their_field(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^unfreezing\.{field}: .* found"):
        UnfreezingConfig(**{field: value})
    assert not UnfreezingConfig().active


def test_parts_that_would_never_train_are_refused(tiny_bert: Path) -> None:
    config = UnfreezingConfig(gradual=True, epochs_per_layer=1.5, heads_first=1)
    message = r"unfreezing\.epochs_per_layer: with 1\.5 .* after 4 epochs, but training has 4; possible: below 1\.5, or"
    with pytest.raises(ConfigError, match=message):
        Unfreezing(make(tiny_bert), config, 4)
    Unfreezing(make(tiny_bert), config, 4.1)


def test_an_encoder_that_would_never_train_is_refused(tiny_bert: Path) -> None:
    with pytest.raises(ConfigError, match=r"unfreezing\.heads_first: after 3 epochs .* training has 3"):
        Unfreezing(make(tiny_bert, "full"), UnfreezingConfig(heads_first=3), 3)
