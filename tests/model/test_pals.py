"""Projected attention layers: what they compute for whom, how they start, which sizes they can have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.naive_bert import naive_hidden
from support.packed import Packed, random_batch
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.model import BertEncoder, load_encoder
from mtbert.model.context import ForwardContext
from mtbert.model.pals import PalConfig, add_pals

F64 = torch.float64
TASKS = ["sst", "para", "sts"]
BATCH = random_batch({"sst": [5, 9, 1, 3], "sst/simcse": [5, 2], "para": [40, 2], "sts": [7, 7]}, 100)
CONFIG = PalConfig(size=12, heads=3)


def projected(folder: Path, config: PalConfig = CONFIG, *, trained: bool = True) -> BertEncoder:
    encoder = load_encoder(folder, dtype=F64)
    generator = torch.Generator().manual_seed(1)
    add_pals(encoder, config, TASKS, generator)
    if trained:
        with torch.no_grad():
            for name, parameter in encoder.named_parameters():
                if name.startswith("pals."):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64) * 0.3)
    return encoder


def hidden_states(encoder: BertEncoder, batch: Packed = BATCH) -> Tensor:
    with torch.no_grad():
        return encoder(batch, dtype=F64)


def test_untrained_is_plain_bert(tiny_bert: Path):
    plain = load_encoder(tiny_bert, dtype=F64)
    assert torch.equal(hidden_states(projected(tiny_bert, trained=False)), hidden_states(plain))


@pytest.mark.parametrize(
    "config",
    [CONFIG, PalConfig(size=16, heads=1), PalConfig(size=12, heads=12), PalConfig(12, 3, [1])],
    ids=["3 heads", "1 head", "heads of 1", "one layer"],
)
def test_equals_the_layers_written_out(tiny_bert: Path, config: PalConfig):
    encoder = projected(tiny_bert, config)
    found = hidden_states(encoder)
    assert (found - naive_hidden(encoder, BATCH).detach()).abs().max().item() < 1e-10
    plain = hidden_states(load_encoder(tiny_bert, dtype=F64))
    assert (found - plain).abs().amax(1).min().item() > 0.01


def test_gradients_equal_those_of_the_written_out_network(tiny_bert: Path):
    encoder = projected(tiny_bert)
    upstream = torch.randn(BATCH.input_ids.shape[0], 32, dtype=F64)
    parameters = {n: p for n, p in encoder.named_parameters() if not n.startswith("pooler.")}
    found = torch.autograd.grad(encoder(BATCH, dtype=F64), list(parameters.values()), upstream)
    expected = torch.autograd.grad(naive_hidden(encoder, BATCH), list(parameters.values()), upstream)
    for name, ours, theirs in zip(parameters, found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10), name


def test_a_task_uses_its_own_layers_alone(tiny_bert: Path):
    encoder = projected(tiny_bert)
    before = hidden_states(encoder)
    with torch.no_grad():
        encoder.pals.of_task("para").up.weight.add_(1.0)
    changed = (hidden_states(encoder) != before).any(dim=1)
    para = BATCH.segments[2].tokens
    assert changed[para.start : para.stop].all()
    assert not changed[: para.start].any()
    assert not changed[para.stop :].any()


def test_tokens_of_other_tasks_get_plain_bert(tiny_bert: Path):
    batch = random_batch({"sst": [4, 2], "other": [5, 3]}, 100)
    found = hidden_states(projected(tiny_bert), batch)
    plain = hidden_states(load_encoder(tiny_bert, dtype=F64), batch)
    assert torch.equal(found[6:], plain[6:])
    assert not torch.equal(found[:6], plain[:6])


def test_only_the_last_projection_is_zero_and_moves_first(tiny_bert: Path):
    encoder = projected(tiny_bert, trained=False)
    own = encoder.pals.of_task("sst")
    assert own.up.weight.eq(0).all()
    assert own.down.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert own.query_key_value["1"].weight.std().item() == pytest.approx(0.02, rel=0.2)
    encoder(BATCH, dtype=F64).square().sum().backward()
    assert own.up.weight.grad.abs().max().item() > 0


def test_projections_are_shared_by_the_layers(tiny_bert: Path):
    own = projected(tiny_bert).pals.of_task("sts")
    sizes = {name: tuple(parameter.shape) for name, parameter in own.named_parameters() if "weight" in name}
    assert sizes == {
        "down.weight": (12, 32),
        "query_key_value.0.weight": (36, 12),
        "query_key_value.1.weight": (36, 12),
        "up.weight": (32, 12),
    }


def test_neighbouring_streams_of_a_task_are_one_stretch():
    expected = [("sst", slice(0, 25)), ("para", slice(25, 67)), ("sts", slice(67, 81))]
    assert ForwardContext(BATCH, F64).task_tokens == expected
    empty = random_batch({"sst": [3], "para": [0, 0], "sts": [2]}, 100)
    assert ForwardContext(empty, F64).task_tokens == [("sst", slice(0, 3)), ("sts", slice(3, 5))]


def test_segments_must_hold_every_token(tiny_bert: Path):
    encoder = projected(tiny_bert)
    with pytest.raises(ValueError, match="the segments end at token"):
        hidden_states(encoder, replace(BATCH, segments=BATCH.segments[:-1]))
    with pytest.raises(ValueError, match="segment para starts at token 25, expected 18"):
        hidden_states(encoder, replace(BATCH, segments=(BATCH.segments[0], *BATCH.segments[2:])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": -1}, "model.pals.size: expected 0 to 16384, found -1"),
        ({"size": 12, "heads": 0}, "model.pals.heads: expected 1 to 16384, found 0"),
        ({"size": 200}, "model.pals.size: 200 is not a multiple of model.pals.heads 12; possible: 192, 204"),
        ({"size": 5}, "model.pals.size: 5 is not a multiple of model.pals.heads 12; possible: 12"),
    ],
)
def test_impossible_values_are_named(options: dict, message: str):
    with pytest.raises(ConfigError) as error:
        PalConfig(**options)
    assert message in str(error.value)


def test_layers_outside_the_model_are_refused(tiny_bert: Path):
    with pytest.raises(ConfigError, match=r"model\.pals\.layers: no layer 7"):
        projected(tiny_bert, PalConfig(12, 3, [7]))
