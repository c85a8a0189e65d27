"""Bytes and FLOPs of each operation by formula: the least that any implementation needs.

Every input is read once and every output is written once, forward and backward each on its own; the backward pass gets
the inputs of the forward pass again, and computes from them what else it needs. Random bits cost nothing.
`kernel_traffic.py` has what mtbert's Triton kernels move beyond it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.kernel_calls import Setting

_INDEX = 4
"""Bytes of an index, of a length, and of the mask's row."""


@dataclass(frozen=True)
class Cost:
    """Of one call."""

    forward_bytes: float
    backward_bytes: float
    forward_flops: float
    backward_flops: float

    @property
    def bytes(self) -> float:
        """Of both passes."""
        return self.forward_bytes + self.backward_bytes

    @property
    def flops(self) -> float:
        """Of both passes."""
        return self.forward_flops + self.backward_flops


def dropout(s: Setting) -> Cost:
    """x in and out; its gradient in and out. A product an element."""
    n = s.tokens * s.encoder.width
    each = 2 * n * s.dtype.itemsize + _INDEX * s.tokens
    return Cost(each, each, n, n)


def attention(s: Setting) -> Cost:
    """Forward: q, k, v in, out out. Backward: q, k, v and the output's gradient in, three gradients out.

    FLOPs: two products of 2 L^2 C forward and four backward (dV, dP, dQ, dK), and 5 an element of the probabilities for
    the softmax each way. A kernel that keeps no probabilities multiplies Q K^T again: a fifth product.
    """
    c = s.encoder.width
    masked = _INDEX * s.tokens * (s.p > 0) + _INDEX * (len(s.lengths) + 1)
    each = s.tokens * c * s.dtype.itemsize
    squares = float((np.asarray(s.lengths, dtype=np.float64) ** 2).sum())
    product, softmax = 2 * squares * c, 5 * squares * s.encoder.heads
    return Cost(4 * each + masked, 7 * each + masked, 2 * product + softmax, 4 * product + softmax)


def softmax(s: Setting) -> Cost:
    """Forward: the scores within the row's length in, all columns out. Backward: those and the gradient in, all out.

    FLOPs: maximum, difference, exponential, sum, quotient; two products, a sum and a difference backward.
    """
    heads, wide, size = s.encoder.heads, s.max_seqlen, s.dtype.itemsize
    lengths = np.asarray(s.lengths, dtype=np.float64)
    inside, everything = float((lengths**2).sum()) * heads, float(s.tokens) * heads * wide
    rows = s.tokens * heads * _INDEX * (1 + (s.p > 0))
    return Cost(
        (inside + everything) * size + rows,
        (2 * inside + everything) * size + rows,
        5 * inside,
        4 * inside,
    )


def add_layer_norm(s: Setting) -> Cost:
    """Forward: x and residual in, out out. Backward: x, residual and gradient in, two gradients out.

    Without dropout the two gradients are one. The backward pass needs two of the three parameters.
    FLOPs: two sums, the mask's product, mean, variance (3), normalising (4) forward; 15 backward.
    """
    n = s.tokens * s.encoder.width
    rows = s.tokens * _INDEX * (s.p > 0)
    parameter = s.encoder.width * s.parameters.itemsize
    gradients = 3 * parameter * max(1, s.groups) * s.trained
    return Cost(
        3 * n * s.dtype.itemsize + rows + 3 * parameter,
        (5 if s.p > 0 else 4) * n * s.dtype.itemsize + rows + 2 * parameter + gradients,
        11 * n,
        15 * n,
    )


def bias_gelu(s: Setting) -> Cost:
    """Forward: x in, out out. Backward: x and gradient in, gradient out.

    FLOPs: about 25 for an exact error function, with the sum and the two products; 15 more backward.
    """
    n = s.tokens * s.encoder.inner
    parameters = s.encoder.inner * s.parameters.itemsize
    gradients = parameters * max(1, s.groups) * s.trained
    each = n * s.dtype.itemsize
    return Cost(2 * each + parameters, 3 * each + parameters + gradients, 28 * n, 43 * n)


def embedding(s: Setting, words: int) -> Cost:
    """Forward: every row of a table that is used in once, out out. Backward: gradient and those rows in, dense
    gradients of the tables out. `words`: different ones in the batch.

    With segments by slots the word table's gradient has the `words` rows of each group.
    FLOPs: two sums and LayerNorm as in `add_layer_norm`.
    """
    e = s.encoder
    n, row = s.tokens * e.width, e.width * s.parameters.itemsize
    positions = min(e.positions, max(s.lengths))
    used = (words + positions + e.types + 2) * row
    tokens = s.tokens * _INDEX * (3 + (s.p > 0))
    dense = (words if s.slots else e.vocabulary) + e.positions + e.types + 2
    gradients = dense * row * max(1, s.groups) * s.trained
    out = n * s.dtype.itemsize
    return Cost(used + tokens + out, (used + tokens + out + gradients) * s.trained, 10 * n, 15 * n)


COSTS: dict[str, Callable[..., Cost]] = {
    "dropout": dropout,
    "attention": attention,
    "softmax": softmax,
    "add_layer_norm": add_layer_norm,
    "bias_gelu": bias_gelu,
    "embedding": embedding,
}


def least(operation: str, setting: Setting, *, words: int = 0) -> Cost:
    """What a call of `operation` needs at least. words: the embedding's number of different words."""
    return COSTS[operation](setting, **({"words": words} if operation == "embedding" else {}))
