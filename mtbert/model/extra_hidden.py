"""Extra hidden layers behind every attention head (algorithm 1 of Peng, Yuan and Wang 2024).

The paper adds 1 to 5 hidden layers "to each attention head's output", with weights of their own for every head,
before the heads are joined by the output projection. It doesn't say how they start. Here a head's output o [D] becomes

    o + V h_n,    h_i = act(W_i h_(i-1) + b_i),    h_0 = o,    i = 1 .. n (depth),

a multilayer perceptron with n hidden layers of the head's width beside a skip connection. V starts at zero, so that
the untrained model is plain BERT; W_i is drawn so that the scale is kept (Glorot and Bengio 2010), b_i is zero. V has
no bias: the output projection that follows has one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mtbert.errors import ConfigError
from mtbert.kernels.head_linear import head_linear
from mtbert.model.activations import activation
from mtbert.model.context import ForwardContext
from mtbert.model.layer_groups import LayerGroup, layer_numbers

if TYPE_CHECKING:
    from mtbert.model.bert import BertEncoder

MAX_DEPTH = 5


@dataclass(frozen=True)
class ExtraHiddenConfig:
    """Hidden layers behind every attention head."""

    depth: int = 0
    """Hidden layers, 1 to 5, of the head's width and with weights for each head; 0: none."""
    layers: LayerGroup | list[int] = "all"
    """The encoder layers that get them: all, first4, mid4, last4 or a list of layer numbers from 0."""
    activation: str = "gelu"
    """An element-wise activation of torch, or none."""

    def __post_init__(self) -> None:
        if not 0 <= self.depth <= MAX_DEPTH:
            raise ConfigError(f"model.extra_hidden.depth: expected 0 to {MAX_DEPTH}, found {self.depth}")
        activation(self.activation, "model.extra_hidden.activation", random=False)


class HeadLinear(nn.Module):
    """A linear map of its own for every head: weight [H, D, D], bias [H * D] or none."""

    def __init__(self, heads: int, size: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, size, size))
        self.bias = nn.Parameter(torch.zeros(heads * size)) if bias else None

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """[T, H, D] -> [T, H, D]."""
        return head_linear(x, self.weight, self.bias, segments=context.segments)


class ExtraHidden(nn.Module):
    """The perceptrons behind the heads of one layer."""

    def __init__(
        self, heads: int, size: int, config: ExtraHiddenConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.activation = activation(config.activation)
        self.hidden = nn.ModuleList()
        for _ in range(config.depth):
            layer = HeadLinear(heads, size, bias=True)
            bound = math.sqrt(3.0 / size)
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            self.hidden.append(layer)
        self.output = HeadLinear(heads, size, bias=False)

    def forward(self, attended: Tensor, context: ForwardContext) -> Tensor:
        """The heads' outputs [T, H, D] -> [T, H, D]."""
        hidden = attended
        for layer in self.hidden:
            hidden = context.cheap(self.activation, layer(hidden, context))
        return attended + self.output(hidden, context)


def add_extra_hidden(
    encoder: BertEncoder, config: ExtraHiddenConfig, generator: torch.Generator | None = None
) -> None:
    """Put extra hidden layers on `encoder`, which computes the same as before until they are trained."""
    if not config.depth:
        raise ValueError("extra hidden layers of depth 0")
    sizes = encoder.config
    for number in layer_numbers("model.extra_hidden.layers", config.layers, len(encoder.layers)):
        extra = ExtraHidden(sizes.num_attention_heads, sizes.head_size, config, generator)
        encoder.layers[number].extra_hidden = extra.to(encoder.pooler.weight)
