"""Extra hidden layers behind the attention heads: what they compute, how they start, who may have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.naive_bert import naive_hidden
from support.packed import random_batch
from support.tiny_bert import write_tiny_bert
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.model import BertEncoder, load_encoder
from mtbert.model.extra_hidden import ExtraHidden, ExtraHiddenConfig, add_extra_hidden

F64 = torch.float64
BATCH = random_batch({"sst": [5, 9, 1, 3], "para": [40, 2]}, 100)


def extended(folder: Path, config: ExtraHiddenConfig, *, trained: bool = True) -> BertEncoder:
    encoder = load_encoder(folder, dtype=F64)
    generator = torch.Generator().manual_seed(1)
    add_extra_hidden(encoder, config, generator)
    if trained:
        with torch.no_grad():
            for name, parameter in encoder.named_parameters():
                if "extra_hidden" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=F64) * 0.3)
    return encoder


def hidden_states(encoder: BertEncoder) -> Tensor:
    with torch.no_grad():
        return encoder(BATCH, dtype=F64)


@pytest.mark.parametrize("depth", [1, 5])
def test_untrained_is_plain_bert(tiny_bert: Path, depth: int):
    config = ExtraHiddenConfig(depth=depth)
    assert torch.equal(
        hidden_states(extended(tiny_bert, config, trained=False)),
        hidden_states(load_encoder(tiny_bert, dtype=F64)),
    )


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("activation", ["gelu", "leaky_relu", "none"])
def test_equals_the_perceptrons_written_out(tiny_bert: Path, depth: int, activation: str):
    encoder = extended(tiny_bert, ExtraHiddenConfig(depth, activation=activation))
    plain = hidden_states(load_encoder(tiny_bert, dtype=F64))
    expected = naive_hidden(encoder, BATCH).detach()
    found = hidden_states(encoder)
    assert (found - expected).abs().max().item() < 1e-10
    assert (found - plain).abs().max().item() > 0.1


def test_gradients_equal_those_of_the_written_out_network(tiny_bert: Path):
    encoder = extended(tiny_bert, ExtraHiddenConfig(depth=2))
    upstream = torch.randn(BATCH.input_ids.shape[0], 32, dtype=F64)
    parameters = {n: p for n, p in encoder.named_parameters() if not n.startswith("pooler.")}
    found = torch.autograd.grad(encoder(BATCH, dtype=F64), list(parameters.values()), upstream)
    expected = torch.autograd.grad(naive_hidden(encoder, BATCH), list(parameters.values()), upstream)
    assert sum("extra_hidden" in name for name in parameters) == 2 * 5
    for name, ours, theirs in zip(parameters, found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10), name


def test_training_can_begin(tiny_bert: Path):
    encoder = extended(tiny_bert, ExtraHiddenConfig(depth=3), trained=False)
    encoder(BATCH, dtype=F64).square().sum().backward()
    for layer in encoder.layers:
        assert layer.extra_hidden.output.weight.grad.abs().min(dim=0).values.max().item() > 0


def test_chosen_layers(tmp_path: Path):
    folder = write_tiny_bert(tmp_path, layers=5)
    for layers, expected in (("last4", [1, 2, 3, 4]), ([2, 0], [0, 2]), ("all", [0, 1, 2, 3, 4])):
        encoder = extended(folder, ExtraHiddenConfig(1, layers=layers))
        assert [n for n, layer in enumerate(encoder.layers) if layer.extra_hidden is not None] == expected


def test_sizes_and_scale_of_the_initial_weights():
    extra = ExtraHidden(12, 32, ExtraHiddenConfig(depth=2), torch.Generator().manual_seed(0))
    assert sum(parameter.numel() for parameter in extra.parameters()) == 12 * (3 * 32 * 32 + 2 * 32)
    for layer in extra.hidden:
        assert layer.weight.std().item() == pytest.approx(32**-0.5, rel=0.05)
        assert layer.bias.eq(0).all()
    assert extra.output.weight.eq(0).all()
    again = ExtraHidden(12, 32, ExtraHiddenConfig(depth=2), torch.Generator().manual_seed(0))
    assert torch.equal(extra.hidden[1].weight, again.hidden[1].weight)


def test_bfloat16(tiny_bert: Path):
    encoder = extended(tiny_bert, ExtraHiddenConfig(depth=1)).float()
    narrow, wide = encoder(BATCH, dtype=torch.bfloat16), encoder(BATCH, dtype=torch.float32)
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - wide).abs().max().item() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 6}, "model.extra_hidden.depth: expected 0 to 5, found 6"),
        ({"depth": -1}, "model.extra_hidden.depth: expected 0 to 5, found -1"),
        (
            {"activation": "gellu"},
            "model.extra_hidden.activation: unknown activation 'gellu'; did you mean 'gelu'?",
        ),
        ({"activation": "rrelu"}, "model.extra_hidden.activation: unknown activation 'rrelu'"),
    ],
)
def test_impossible_values_are_named(options: dict, message: str):
    with pytest.raises(ConfigError) as error:
        ExtraHiddenConfig(**options)
    assert message in str(error.value)


def test_layers_outside_the_model_are_refused(tiny_bert: Path):
    with pytest.raises(
        ConfigError, match=r"model\.extra_hidden\.layers: no layer 2; the encoder has layers 0 to 1"
    ):
        extended(tiny_bert, ExtraHiddenConfig(1, layers=[2]))
