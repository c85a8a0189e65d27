"""Activation functions by name, and the one that needs random numbers."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.kernels import Dropout
from mtbert.kernels.reference import philox4x32

_DETERMINISTIC = (
    "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 selu "
    "sigmoid silu softplus softshrink softsign tanh tanhshrink"
)
RANDOM = "rrelu"
"""Randomised leaky ReLU (Xu et al. 2015): in training, the slope below zero is drawn anew for every element."""
ACTIVATIONS = tuple(sorted([*_DETERMINISTIC.split(), RANDOM]))
"""The element-wise activations of torch.nn.functional that need no parameter."""

RANDOM_SLOPES = (1 / 8, 1 / 3)
"""The slopes of `rrelu` are uniform between these, torch's defaults; outside of training the slope is their mean."""


def activation(
    name: str, field: str = "head.activation", *, random: bool = True
) -> Callable[[Tensor], Tensor]:
    """The activation of that name; ConfigError, naming `field` and the nearest known name, when there is none.

    random: whether `rrelu` is among them (as a function it is that of evaluation; training uses `random_relu`).
    """
    if name == "none":
        return _identity
    names = [entry for entry in ACTIVATIONS if random or entry != RANDOM]
    known = {entry.replace("_", ""): entry for entry in names}
    key = name.lower().replace("_", "")
    if key not in known:
        close = difflib.get_close_matches(key, [*known, "none"], n=1)
        hint = f"; did you mean {known.get(close[0], close[0])!r}?" if close else ";"
        raise ConfigError(f"{field}: unknown activation {name!r}{hint} possible: none, {', '.join(names)}")
    function: Callable[[Tensor], Tensor] = getattr(F, known[key])
    return function


def is_random(name: str) -> bool:
    """Whether the activation of that name draws random numbers in training."""
    return name.lower().replace("_", "") == RANDOM


def random_relu(x: Tensor, dropout_row: Tensor, draw: Dropout) -> Tensor:
    """`rrelu` in training: x [n, C], its random numbers named as those of a dropout mask (whose p plays no part)."""
    low, high = RANDOM_SLOPES
    groups = torch.arange(-(-x.shape[1] // 8), device=x.device)
    rows = dropout_row.to(torch.int64) & 0xFFFFFFFF
    key = (draw.seed & 0xFFFFFFFF, draw.seed >> 32)
    words = philox4x32(key, (groups[None, :], rows[:, None], draw.site, draw.step))
    lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    slopes = low + (high - low) / 65536 * (lanes.flatten(1)[:, : x.shape[1]].to(x.dtype) + 0.5)
    return torch.where(x >= 0, x, x * slopes)


def _identity(x: Tensor) -> Tensor:
    return x
