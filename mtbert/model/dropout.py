"""Where dropout happens: a number for every place in the network, and the stream of masks of one forward
pass.

A mask is a pure function of (seed, step, site, row, column), see `mtbert.kernels.Dropout`; nothing is drawn
from a generator with state. The functions here name the sites, so that a test or a reference can ask for
the same mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.kernels import Dropout

EMBEDDING = 0
"""After the embeddings' LayerNorm: columns are the hidden dimensions."""

FORWARD_PASS = 2**20
"""Sites of one forward pass lie below it; pass number n of a step adds n times this."""

_FIRST_HEAD = 2**19
_FIRST_MATRIX = _FIRST_HEAD + 2**18
_PLACES = 16
_DEPTHS = 64


class Place(IntEnum):
    """Where in a layer dropout applies."""

    ATTENTION = 0
    """The attention probabilities: the row is the query token's, the column head * 4096 + key position."""
    ATTENTION_OUTPUT = 1
    """Before the residual sum after attention."""
    OUTPUT = 2
    """Before the residual sum after the feed-forward part."""
    LORA_QKV = 3
    """The input of the query, key and value adapters: one mask for the three."""
    LORA_ATTENTION_OUTPUT = 4
    LORA_INTERMEDIATE = 5
    LORA_OUTPUT = 6


def layer_site(layer: int, place: Place) -> int:
    """Site of a place in encoder layer `layer` (from 0)."""
    site = _PLACES * (layer + 1) + place
    if layer < 0 or site >= _FIRST_HEAD:
        raise ValueError(f"layer {layer} has no dropout site")
    return site


def head_site(head_index: int, depth: int) -> int:
    """Site before linear layer `depth` of head `head_index` (both from 0; towers come before hidden
    layers)."""
    if not 0 <= depth < _DEPTHS or not 0 <= head_index < (_FIRST_MATRIX - _FIRST_HEAD) // _DEPTHS:
        raise ValueError(f"head {head_index}, depth {depth} has no dropout site")
    return _FIRST_HEAD + _DEPTHS * head_index + depth


def mixout_site(matrix: int) -> int:
    """Site of mixout on weight matrix number `matrix` (from 0): rows and columns of the mask are the matrix's own."""
    if not 0 <= matrix < FORWARD_PASS - _FIRST_MATRIX:
        raise ValueError(f"matrix {matrix} has no dropout site")
    return _FIRST_MATRIX + matrix


def activation_site(head_index: int, depth: int) -> int:
    """Site of a random activation behind linear layer `depth` of a head."""
    if depth >= _DEPTHS // 2:
        raise ValueError(f"head {head_index}, depth {depth} has no site of a random activation")
    return head_site(head_index, _DEPTHS // 2 + depth)


@dataclass(frozen=True)
class DropoutStream:
    """The masks of one forward pass: the run's seed, the step, and which pass of the step it is."""

    seed: int
    step: int | Tensor
    """A tensor (int64, of one element, on the model's device) where the step is captured in a graph."""
    forward_pass: int = 0

    def at(self, p: float, site: int) -> Dropout | None:
        """The mask at `site` with dropout probability `p`; None when nothing is dropped."""
        if p == 0.0:
            return None
        return Dropout(p=p, seed=self.seed, step=self.step, site=site + self.forward_pass * FORWARD_PASS)


@dataclass(frozen=True)
class DropoutRates:
    """Dropout probabilities of the encoder."""

    embedding: float = 0.1
    """After the embeddings' LayerNorm."""
    attention: float = 0.1
    """On the attention probabilities."""
    hidden: float = 0.1
    """On the output of each sub-layer, before its residual sum."""

    def __post_init__(self) -> None:
        for name in ("embedding", "attention", "hidden"):
            check_probability(f"dropout.{name}", getattr(self, name))


def check_probability(field: str, value: float) -> None:
    """Raise ConfigError unless `value` can be a dropout probability."""
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"{field}: expected a probability of at least 0 and below 1, found {value}")
