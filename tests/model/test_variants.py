"""Variants of the encoder from the configuration: heads, layers, and how they go with modes, files and checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.naive_bert import naive_hidden
from support.packed import random_batch
from support.tiny_bert import write_tiny_bert

from mtbert.errors import ConfigError, ModelFileError
from mtbert.model import (
    ExtraHiddenConfig,
    HeadConfig,
    HeadSpec,
    LoraConfig,
    ModelConfig,
    MultiTaskModel,
    PalConfig,
    build_model,
    load_config,
    load_encoder,
    save_encoder,
)

F64 = torch.float64
SPECS = [
    HeadSpec("sst", 5, pair=False),
    HeadSpec("para", 1, pair=True),
    HeadSpec("sts", 1, pair=True, score_range=(0.0, 5.0)),
]
HEADS = {
    "sst": HeadConfig(pooling="pooler"),
    "para": HeadConfig(pair=["concat"]),
    "sts": HeadConfig(pooling="mean", pair=["cosine"]),
}
BATCH = random_batch({"sst": [5, 9, 1, 3], "para": [40, 2], "sts": [7, 7]}, 100)
EXTRA, PALS = ExtraHiddenConfig(depth=2), PalConfig(size=12, heads=3)
LORA = LoraConfig(rank=2, dropout=0.0)


def build(
    folder: Path, *, mode: str = "full", moved: bool = False, seed: int = 3, **options: Any
) -> MultiTaskModel:
    """A float64 model; `moved` shifts every trainable parameter at random."""
    model = build_model(
        folder,
        ModelConfig(pretrained=str(folder), **options),
        mode=mode,
        specs=SPECS,
        heads=HEADS,
        max_lengths={spec.name: 64 for spec in SPECS},
        seed=seed,
    ).double()
    if moved:
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=F64) * 0.1)
    return model


@torch.no_grad()
def outputs(model: MultiTaskModel) -> list[torch.Tensor]:
    return [value for _, value in sorted(model(BATCH, dtype=F64).items())]


def trained_parts(model: MultiTaskModel) -> set[str]:
    return {count.part for count in model.parameter_counts() if count.trainable} - {"total"}


# ---- the number of heads ----


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16, 32])
def test_other_numbers_of_heads_over_the_same_weights(tiny_bert: Path, heads: int):
    model = build(tiny_bert, attention_heads=heads)
    with torch.no_grad():
        found = model.encoder(BATCH, dtype=F64)
        expected = naive_hidden(load_encoder(tiny_bert, dtype=F64), BATCH, heads=heads)
    assert (found - expected).abs().max().item() < 1e-10
    same = (found - load_encoder(tiny_bert, dtype=F64)(BATCH, dtype=F64)).abs().max().item()
    assert (same < 1e-12) == (heads == 2)


def test_heads_of_the_cpu_kernel_equal_the_reference(minilm: Path):
    batch = random_batch({"sst": [12, 33], "para": [5, 17]}, 30522)
    for heads in (24, 48):
        config = replace(load_config(minilm), num_attention_heads=heads)
        narrow = load_encoder(minilm, config=config)
        wide = load_encoder(minilm, config=config, dtype=F64)
        with torch.no_grad():
            difference = narrow(batch, dtype=torch.float32) - wide(batch, dtype=F64)
        assert difference.abs().max().item() < 1e-4


@pytest.mark.parametrize("heads", [0, -2, 3, 5, 64])
def test_a_number_of_heads_must_divide_the_width(tiny_bert: Path, heads: int):
    with pytest.raises(ConfigError) as error:
        build(tiny_bert, attention_heads=heads)
    expected = (
        f"model.attention_heads: {heads} does not divide the width 32 of {tiny_bert}; possible: 1, 2, 4, "
    )
    assert str(error.value) == expected + "8, 16, 32"


# ---- the layer to pool from ----


@pytest.mark.parametrize("layer", [1, 2, 4])
def test_the_layers_above_are_left_out(tmp_path: Path, layer: int):
    folder = write_tiny_bert(tmp_path, layers=4)
    model = build(folder, pool_layer=layer)
    with torch.no_grad():
        found = model.encoder(BATCH, dtype=F64)
        expected = naive_hidden(load_encoder(folder, dtype=F64), BATCH, layers=layer)
    assert (found - expected).abs().max().item() < 1e-10
    assert len(model.encoder.layers) == layer
    (counted,) = [count.total for count in model.parameter_counts() if count.part == "layers"]
    assert counted == layer * (4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 4 * 32)


@pytest.mark.parametrize("layer", [0, 3, -1])
def test_a_layer_to_pool_from_must_exist(tiny_bert: Path, layer: int):
    with pytest.raises(ConfigError) as error:
        build(tiny_bert, pool_layer=layer)
    expected = f"model.pool_layer: expected 1 to 2, the layers of {tiny_bert}, found {layer}"
    assert str(error.value) == expected


def test_chosen_layers_are_those_that_are_left(tmp_path: Path):
    folder = write_tiny_bert(tmp_path, layers=6)
    model = build(folder, pool_layer=5, extra_hidden=ExtraHiddenConfig(1, "last4"))
    assert [layer.extra_hidden is not None for layer in model.encoder.layers] == [False] + 4 * [True]
    with pytest.raises(ConfigError, match=r"lora\.layers: no layer 5; the encoder has layers 0 to 4"):
        build(folder, pool_layer=5, mode="lora", lora=LoraConfig(layers=[5]))


# ---- what the variants have in common ----

VARIANTS: dict[str, dict[str, Any]] = {
    "extra hidden": {"extra_hidden": EXTRA},
    "pals": {"pals": PALS},
    "both, in fewer layers with more heads": {
        "extra_hidden": EXTRA,
        "pals": PALS,
        "attention_heads": 8,
        "pool_layer": 1,
    },
}


@pytest.mark.parametrize("mode", ["full", "lora", "bitfit"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_mode_trains_the_variant_and_what_is_its_own(tiny_bert: Path, options: dict, mode: str):
    plain = {name: value for name, value in options.items() if name not in ("extra_hidden", "pals")}
    base, model = (
        build(tiny_bert, mode=mode, lora=LORA, **plain),
        build(tiny_bert, mode=mode, lora=LORA, **options),
    )
    added = {name.replace("_", " ") for name in options} & {"extra hidden", "pals"}
    assert trained_parts(model) == trained_parts(base) | added
    changed = build(tiny_bert, mode=mode, lora=LORA, moved=True, **options)
    for untrained, ours, moved in zip(outputs(base), outputs(model), outputs(changed), strict=True):
        assert torch.equal(untrained, ours)
        assert not torch.allclose(ours, moved, rtol=0, atol=1e-3)
    sum(value.square().sum() for value in changed(BATCH, dtype=F64).values()).backward()
    for name, parameter in changed.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    with torch.no_grad():
        found = changed.encoder(BATCH, dtype=F64)
        assert (found - naive_hidden(changed.encoder, BATCH)).abs().max().item() < 1e-10


@pytest.mark.parametrize("mode", ["full", "lora", "bitfit"])
@pytest.mark.parametrize("options", [*VARIANTS.values(), {"lora": replace(LORA, per_task=True)}])
def test_the_state_survives_a_round_trip(tiny_bert: Path, options: dict, mode: str):
    options = {"lora": LORA} | options
    one = build(tiny_bert, mode=mode, moved=True, **options)
    two = build(tiny_bert, mode=mode, seed=8, **options)
    two.load_state_dict(one.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs(one), outputs(two), strict=True))


def test_heads_start_the_same_with_every_variant(tiny_bert: Path):
    plain = build(tiny_bert).heads.state_dict()
    for options in (*VARIANTS.values(), {"attention_heads": 4}):
        if "pool_layer" not in options:
            found = build(tiny_bert, **options).heads.state_dict()
            assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_parameters_are_counted_by_part(tiny_bert: Path):
    model = build(tiny_bert, extra_hidden=EXTRA, pals=PALS)
    counts = {count.part: count for count in model.parameter_counts()}
    assert counts["extra hidden"].total == 2 * 2 * (3 * 16 * 16 + 2 * 16)
    each = (32 * 12 + 12) + 2 * (12 * 36 + 36) + (12 * 32 + 32)
    assert counts["pals"].total == counts["pals"].trainable == 3 * each
    assert counts["total"].total == sum(c.total for part, c in counts.items() if part != "total")


@pytest.mark.parametrize("mode", ["last-linear-layer", "pretrain"])
@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"extra_hidden": EXTRA}, "model.extra_hidden.depth: found 2"),
        ({"pals": PALS}, "model.pals.size: found 12"),
    ],
)
def test_a_frozen_encoder_cannot_have_what_starts_at_nothing(
    tiny_bert: Path, mode: str, options: dict, field: str
):
    with pytest.raises(ConfigError) as error:
        build(tiny_bert, mode=mode, **options)
    assert (
        str(error.value)
        == f"{field}, but mode last-linear-layer trains the heads alone; use full, lora or bitfit"
    )


# ---- files ----


def test_heads_and_fewer_layers_can_be_written_as_a_bert(tmp_path: Path):
    folder = write_tiny_bert(tmp_path / "from", layers=3)
    model = build(folder, attention_heads=8, pool_layer=2, moved=True)
    save_encoder(model.encoder, tmp_path / "to")
    again = load_encoder(tmp_path / "to", dtype=F64)
    assert (again.config.num_attention_heads, again.config.num_hidden_layers) == (8, 2)
    with torch.no_grad():
        assert torch.equal(again(BATCH, dtype=F64), model.encoder(BATCH, dtype=F64))


@pytest.mark.parametrize(
    ("mode", "options", "named"),
    [
        ("full", {"extra_hidden": EXTRA, "pals": PALS}, "model.extra_hidden, model.pals"),
        (
            "lora",
            {"lora": replace(LORA, per_task=True)},
            "lora.per_task; export --format with --task folds one task's in",
        ),
    ],
)
def test_other_variants_cannot(tiny_bert: Path, tmp_path: Path, mode: str, options: dict, named: str):
    with pytest.raises(ModelFileError, match=f"which has no place for {named}$"):
        save_encoder(build(tiny_bert, mode=mode, **options).encoder, tmp_path / "to")
    assert not (tmp_path / "to").exists()
