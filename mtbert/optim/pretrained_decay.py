"""Decay of the encoder's weights towards the values that they were pretrained to."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn

from mtbert.errors import ConfigError

_PRETRAINED = re.compile(
    r"embeddings\.(word|position|token_type|norm\.\w+)"
    r"|layers\.\d+\.(query_key_value|attention_output|attention_norm|intermediate|output|output_norm)\.(weight|bias)"
    r"|pooler\.(weight|bias)"
)


def is_pretrained(name: str) -> bool:
    """Whether a parameter of `BertEncoder` comes from the pretrained file: it is not an adapter or other addition."""
    return _PRETRAINED.fullmatch(name) is not None


class PretrainedDecay:
    """Adds the gradient of strength / 2 * |w - w0|^2, where w0 is the pretrained value of w.

    Source: Zhang et al. 2021, Revisiting few-sample BERT fine-tuning (pre-trained weight decay); the
    target is that of RecAdam (Chen et al. 2020). Unlike `optim.weight_decay`, it is a part of the gradient.
    """

    def __init__(self, encoder: Iterable[tuple[str, nn.Parameter]], strength: float) -> None:
        """encoder: its trained parameters by name, with the pretrained values in them; additions are left out."""
        parameters = [parameter for name, parameter in encoder if is_pretrained(name)]
        if not parameters:
            raise ConfigError(
                f"optim.pretrained_decay: this mode trains no pretrained weight, found {strength}; possible: 0"
            )
        self.strength = strength
        self._weights = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add strength * (w - w0) to the `.grad` of every parameter that has one; those without one are frozen."""
        trained = [
            (parameter, parameter.grad, initial)
            for parameter, initial in self._weights
            if parameter.grad is not None
        ]
        if trained:
            weights, gradients, initials = map(list, zip(*trained, strict=True))
            differences = torch._foreach_sub(weights, initials)
            torch._foreach_add_(gradients, differences, alpha=self.strength)
