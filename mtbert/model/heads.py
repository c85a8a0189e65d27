"""Task heads: from the pooled rows of one task to its outputs.

    row [C] -> towers -> pair feature -> hidden layers -> output layer

A layer is dropout, a linear map and (except the last) the activation. A single sentence, or a pair read as
one row by a cross-encoder, has no pair feature: towers and hidden layers follow each other. Heads compute
in the dtype of their parameters, whatever the encoder computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtbert import kernels
from mtbert.errors import ConfigError
from mtbert.model.activations import activation, is_random, random_relu
from mtbert.model.bert import initialise
from mtbert.model.dropout import DropoutStream, activation_site, check_probability, head_site
from mtbert.model.pooling import POOLINGS, Pooling

PairFeature = Literal["concat", "difference", "product", "dot", "cosine"]

PAIR_FEATURES: tuple[str, ...] = get_args(PairFeature)
CROSS_ENCODER = "cross-encoder"
MAX_LAYERS = 4
MAX_WIDTH = 16384


@dataclass(frozen=True)
class HeadConfig:
    """The shape of a task's head."""

    pooling: Pooling = "cls"
    """A row's features: the first token's last hidden state (cls), BERT's pooler of it (pooler), or the
    mean of all the row's tokens, [CLS] and [SEP] included as in sentence-transformers (mean)."""
    tower_layers: int = 0
    """Layers, 0 to 4, on each row before the pair feature; the two texts of a pair share them."""
    hidden_layers: int = 0
    """Layers, 0 to 4, after the pair feature."""
    hidden_size: int | None = None
    """Width of the towers and hidden layers; by default the encoder's."""
    activation: str = "gelu"
    """An element-wise activation of torch, as its function or its module is called (leaky_relu, GELU; rrelu draws
    its slopes anew in training), or none."""
    dropout: float = 0.1
    """Dropout before every linear layer of the head, unless its input is a single number."""
    pair: Literal["cross-encoder"] | list[PairFeature] = "cross-encoder"
    """How a pair is read: as one row (cross-encoder), or as two rows u and v that are joined by one or more
    features: concat (u, v), difference |u - v|, product u * v, dot u . v, cosine."""

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ConfigError(
                f"head.pooling: unknown pooling {self.pooling!r}; possible: {', '.join(POOLINGS)}"
            )
        for name in ("tower_layers", "hidden_layers"):
            if not 0 <= getattr(self, name) <= MAX_LAYERS:
                raise ConfigError(f"head.{name}: expected 0 to {MAX_LAYERS}, found {getattr(self, name)}")
        if self.hidden_size is not None and not 1 <= self.hidden_size <= MAX_WIDTH:
            raise ConfigError(f"head.hidden_size: expected 1 to {MAX_WIDTH}, found {self.hidden_size}")
        check_probability("head.dropout", self.dropout)
        activation(self.activation)
        if self.pair != CROSS_ENCODER:
            _check_pair_features(self.pair)


def _check_pair_features(features: str | Iterable[str]) -> None:
    possible = f"{CROSS_ENCODER}, or a list of {', '.join(PAIR_FEATURES)}"
    if isinstance(features, str):
        raise ConfigError(f"head.pair: expected {possible}, found {features!r}")
    names = list(features)
    for name in names:
        if name not in PAIR_FEATURES:
            raise ConfigError(f"head.pair: unknown feature {name!r}; possible: {possible}")
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"head.pair: expected different features, at least one, found {names}")


@dataclass(frozen=True)
class HeadSpec:
    """What a task needs of its head."""

    name: str
    """The task."""
    outputs: int
    """Numbers an example: one logit a class, one logit for a binary task, one score for a similarity."""
    pair: bool
    """Whether an example is two texts."""
    score_range: tuple[float, float] | None = None
    """Lowest and highest label of a similarity task, else None."""


class Head(nn.Module):
    """One task's head. `index` is its number in the model: it tells the heads' dropout masks apart.

    The output layer is linear and drawn as BERT draws its weights. Two cases differ, because one number is
    nearly the answer already:
    - `cosine` alone on a similarity has no output layer: the score is low + (high - low) * cosine;
    - `cosine` or `dot` alone elsewhere: a learned gain and offset. They start where the cosine, or the dot
      product divided by the width, is the scaled score of a similarity, and where its value of 0.5 is the
      decision boundary of a binary task.
    """

    def __init__(
        self,
        spec: HeadSpec,
        config: HeadConfig,
        width: int,
        *,
        index: int = 0,
        generator: torch.Generator | None = None,
        deviation: float = 0.02,
    ) -> None:
        super().__init__()
        self.spec, self.config, self.index = spec, config, index
        self.parts: dict[str, Callable[..., Tensor]] = {
            "join": self._join,
            "dense": self._dense,
            "score": self._score,
        }
        """What the head computes between its masks: functions of tensors alone, which may be compiled."""
        self.activation = activation(config.activation)
        self.features: tuple[str, ...] = ()
        if spec.pair and config.pair != CROSS_ENCODER:
            self.features = tuple(config.pair)
        inner = config.hidden_size or width
        self.towers = nn.ModuleList()
        for _ in range(config.tower_layers):
            self.towers.append(nn.Linear(width, inner))
            width = inner
        joined = self._joined_width(width)
        scalar = len(self.features) == 1 and joined == 1
        if scalar and config.hidden_layers:
            raise ConfigError(
                f"{spec.name}.head.hidden_layers: nothing can follow the one number of pair "
                f"{list(self.features)}; use tower_layers"
            )
        self.ready = scalar and not config.tower_layers
        """Whether it answers sensibly before any training: with the cosine or dot product of the pooled rows alone."""
        self.hidden = nn.ModuleList()
        for _ in range(config.hidden_layers):
            self.hidden.append(nn.Linear(joined, inner))
            joined = inner
        self.output: nn.Linear | None = None
        if not (self.features == ("cosine",) and spec.score_range is not None):
            self.output = nn.Linear(joined, spec.outputs)
        for parameter in self.parameters():
            initialise(parameter, False, deviation, generator)
        if scalar and self.output is not None and spec.outputs == 1:
            unit = 1.0 if self.features == ("cosine",) else 1.0 / width
            gain, offset = (unit, 0.0) if spec.score_range is not None else (10.0 * unit, -5.0)
            nn.init.constant_(self.output.weight, gain)
            nn.init.constant_(self.output.bias, offset)

    @property
    def rows_per_example(self) -> int:
        """2 when the head joins the two rows of a pair, else 1."""
        return 2 if self.features else 1

    @property
    def used_parts(self) -> list[str]:
        """The names in `parts` that this head computes."""
        hidden = [*self.towers, *self.hidden]
        used = {
            "join": bool(self.features),
            "dense": bool(hidden) and not is_random(self.config.activation),
            "score": self.output is not None or self.spec.score_range is not None,
        }
        return [name for name, is_used in used.items() if is_used]

    @property
    def draws_masks(self) -> bool:
        """Whether training computes other outputs under other dropout masks."""
        hidden = [*self.towers, *self.hidden]
        layers = hidden if self.output is None else [*hidden, self.output]
        drops = self.config.dropout > 0 and any(layer.in_features > 1 for layer in layers)
        return drops or (bool(hidden) and is_random(self.config.activation))

    def forward(
        self, rows: Tensor, dropout_row: Tensor | None = None, dropout: DropoutStream | None = None
    ) -> Tensor:
        """Pooled rows [n * rows_per_example, C] -> [n, outputs]: logits, or scores in label units.

        The two rows of a pair stand next to each other. dropout_row: int32, one a row, that of its first
        token; needed with `dropout`.
        """
        x = self.climb(rows, dropout_row, dropout)
        depth = len(self.towers)
        if self.features:
            x = self.parts["join"](x)
            if dropout_row is not None:
                dropout_row = dropout_row[::2].contiguous()  # the first text's row
        for layer in _linears(self.hidden):
            x = self._layer(layer, x, dropout_row, dropout, depth)
            depth += 1
        if self.output is not None:
            x = self._drop(x, dropout_row, dropout, depth)
            return self.parts["score"](x, self.output.weight, self.output.bias)
        return self.parts["score"](x)

    def climb(
        self, rows: Tensor, dropout_row: Tensor | None = None, dropout: DropoutStream | None = None
    ) -> Tensor:
        """Pooled rows [m, C] through the towers: what the pair feature compares. [m, width of the towers]"""
        # A head without parameters (cosine alone) computes in the dtype of its rows.
        x = rows.to(next((parameter.dtype for parameter in self.parameters()), rows.dtype))
        for depth, layer in enumerate(_linears(self.towers)):
            x = self._layer(layer, x, dropout_row, dropout, depth)
        return x

    def _drop(
        self, x: Tensor, dropout_row: Tensor | None, dropout: DropoutStream | None, depth: int
    ) -> Tensor:
        mask = dropout.at(self.config.dropout, head_site(self.index, depth)) if dropout else None
        if mask is None or x.shape[1] == 1:
            return x
        if dropout_row is None:
            raise ValueError("dropout in a head needs dropout_row")
        return kernels.dropout(x, dropout_row, mask)

    def _layer(
        self,
        layer: nn.Linear,
        x: Tensor,
        dropout_row: Tensor | None,
        dropout: DropoutStream | None,
        depth: int,
    ) -> Tensor:
        x = self._drop(x, dropout_row, dropout, depth)
        if dropout is None or not is_random(self.config.activation):
            return self.parts["dense"](x, layer.weight, layer.bias)
        return self._activate(layer(x), dropout_row, dropout, depth)

    def _activate(self, x: Tensor, dropout_row: Tensor | None, dropout: DropoutStream, depth: int) -> Tensor:
        """The random activation."""
        draw = dropout.at(0.5, activation_site(self.index, depth))
        if dropout_row is None or draw is None:
            raise ValueError("a random activation in training needs dropout_row")
        return random_relu(x, dropout_row, draw)

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.activation(F.linear(x, weight, bias))

    def _score(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        if weight is not None:
            x = F.linear(x, weight, bias)
        if self.spec.score_range is not None:
            low, high = self.spec.score_range
            x = low + (high - low) * x
        return x

    def _join(self, x: Tensor) -> Tensor:
        u, v = x.unflatten(0, (-1, 2)).unbind(1)
        join: dict[str, Callable[[], Tensor]] = {
            "concat": lambda: torch.cat((u, v), dim=-1),
            "difference": lambda: (u - v).abs(),
            "product": lambda: u * v,
            "dot": lambda: (u * v).sum(-1, keepdim=True),
            "cosine": lambda: F.cosine_similarity(u, v, dim=-1).unsqueeze(-1),
        }
        return torch.cat([join[feature]() for feature in self.features], dim=-1)

    def _joined_width(self, width: int) -> int:
        widths = {"concat": 2 * width, "difference": width, "product": width, "dot": 1, "cosine": 1}
        return sum(widths[feature] for feature in self.features) if self.features else width


def _linears(layers: nn.ModuleList) -> Iterator[nn.Linear]:
    for layer in layers:
        assert isinstance(layer, nn.Linear)
        yield layer
