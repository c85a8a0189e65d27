"""Decay towards the pretrained weights against the gradient of its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mtbert.errors import ConfigError
from mtbert.model.bert import BertConfig, BertEncoder
from mtbert.model.lora import LoraConfig, add_lora
from mtbert.optim.adamw import OptimizerConfig
from mtbert.optim.pretrained_decay import PretrainedDecay, is_pretrained

SMALL = BertConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=16,
)


def encoder_of() -> BertEncoder:
    return BertEncoder(SMALL, generator=torch.Generator().manual_seed(0)).double()


def moved(encoder: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_the_gradient_is_that_of_the_squared_distance() -> None:
    encoder = encoder_of()
    decay = PretrainedDecay(encoder.named_parameters(), 0.3)
    initial = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    moved(encoder)
    distance = torch.stack(
        [(p - initial[name]).square().sum() for name, p in encoder.named_parameters()]
    ).sum()
    expected = torch.autograd.grad(0.3 / 2 * distance, list(encoder.parameters()))
    loss_gradient = {
        name: torch.randn(p.shape, dtype=torch.float64) for name, p in encoder.named_parameters()
    }
    for name, parameter in encoder.named_parameters():
        parameter.grad = loss_gradient[name].clone()
    frozen = encoder.embeddings.word
    frozen.grad = None
    decay.add_gradients()
    assert frozen.grad is None
    for (name, parameter), own in zip(encoder.named_parameters(), expected, strict=True):
        if parameter is not frozen:
            torch.testing.assert_close(parameter.grad, loss_gradient[name] + own, rtol=1e-13, atol=1e-13)


def test_without_gradients_nothing_happens() -> None:
    encoder = encoder_of()
    PretrainedDecay(encoder.named_parameters(), 0.3).add_gradients()
    assert all(p.grad is None for p in encoder.parameters())


def test_every_parameter_of_bert_is_pretrained_and_no_adapter_is() -> None:
    encoder = encoder_of()
    assert all(is_pretrained(name) for name, _ in encoder.named_parameters())
    add_lora(encoder, LoraConfig(rank=2), torch.Generator().manual_seed(0))
    trained = [(name, p) for name, p in encoder.named_parameters() if p.requires_grad]
    assert trained
    assert not any(is_pretrained(name) for name, _ in trained)
    with pytest.raises(ConfigError, match=r"^optim\.pretrained_decay: .* found 0\.3; possible: 0"):
        PretrainedDecay(trained, 0.3)


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_impossible_strengths_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"^optim\.pretrained_decay: .* found"):
        OptimizerConfig(pretrained_decay=value)
