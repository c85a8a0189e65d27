"""Bytes and FLOPs of each operation by formula: the least that any implementation needs.

Every input is read once and every output is written once, forward and backward each on its own; the backward pass gets
the inputs of the forward pass again, and computes from them what else it needs. Random bits cost nothing. Sizes are in
elements, `size` is the bytes of an activation and `parameter` those of a parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

INDEX = 4
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


def total(parts: Iterable[Cost]) -> Cost:
    """The sum of some costs."""
    found = list(parts)
    return Cost(*(sum(getattr(cost, field.name) for cost in found) for field in fields(Cost)))


def dropout(*, tokens: int, width: int, size: int) -> Cost:
    """x in and out; its gradient in and out. A product an element."""
    n = tokens * width
    each = 2 * n * size + INDEX * tokens
    return Cost(each, each, n, n)


def attention(
    *, lengths: Sequence[int] | np.ndarray, width: int, heads: int, size: int, masked: bool
) -> Cost:
    """Forward: q, k, v in, out out. Backward: q, k, v and the output's gradient in, three gradients out.

    FLOPs: two products of 2 L^2 C forward and four backward (dV, dP, dQ, dK), and 5 an element of the probabilities for
    the softmax each way. A kernel that keeps no probabilities multiplies Q K^T again: a fifth product.
    """
    rows = np.asarray(lengths, dtype=np.float64)
    tokens = float(rows.sum())
    indices = INDEX * tokens * masked + INDEX * (len(rows) + 1)
    each = tokens * width * size
    squares = float((rows**2).sum())
    product, softmax = 2 * squares * width, 5 * squares * heads
    return Cost(4 * each + indices, 7 * each + indices, 2 * product + softmax, 4 * product + softmax)


def first_token_attention(
    *, lengths: Sequence[int] | np.ndarray, width: int, heads: int, size: int, masked: bool
) -> Cost:
    """Forward: a query a row and all keys and values in, a vector a row out. Backward: those and the output's gradient
    in, their gradients out.

    FLOPs: as for `attention`, with L products of a query and a key in place of L^2.
    """
    rows = np.asarray(lengths, dtype=np.float64)
    tokens, count = float(rows.sum()), len(rows)
    indices = INDEX * count * masked + INDEX * (count + 1)
    query, keys_values = count * width * size, 2 * tokens * width * size
    product, softmax = 2 * tokens * width, 5 * tokens * heads
    return Cost(
        2 * query + keys_values + indices,
        3 * query + 2 * keys_values + indices,
        2 * product + softmax,
        4 * product + softmax,
    )


def softmax(
    *, lengths: Sequence[int] | np.ndarray, columns: int, heads: int, size: int, masked: bool
) -> Cost:
    """Forward: the scores within the row's length in, all columns out. Backward: those and the gradient in, all out.

    FLOPs: maximum, difference, exponential, sum, quotient; two products, a sum and a difference backward.
    """
    rows = np.asarray(lengths, dtype=np.float64)
    tokens = float(rows.sum())
    inside, everything = float((rows**2).sum()) * heads, tokens * heads * columns
    indices = tokens * heads * INDEX * (1 + masked)
    return Cost(
        (inside + everything) * size + indices,
        (2 * inside + everything) * size + indices,
        5 * inside,
        4 * inside,
    )


def add_layer_norm(
    *, tokens: int, width: int, size: int, parameter: int, masked: bool, groups: int = 0, trained: bool = True
) -> Cost:
    """Forward: x and residual in, out out. Backward: x, residual and gradient in, two gradients out.

    Without dropout the two gradients are one. The backward pass needs two of the three parameters.
    FLOPs: two sums, the mask's product, mean, variance (3), normalising (4) forward; 15 backward.
    """
    n = tokens * width
    indices = tokens * INDEX * masked
    vector = width * parameter
    gradients = 3 * vector * max(1, groups) * trained
    return Cost(
        3 * n * size + indices + 3 * vector,
        (5 if masked else 4) * n * size + indices + 2 * vector + gradients,
        11 * n,
        15 * n,
    )


def bias_gelu(
    *, tokens: int, inner: int, size: int, parameter: int, groups: int = 0, trained: bool = True
) -> Cost:
    """Forward: x in, out out. Backward: x and gradient in, gradient out.

    FLOPs: about 25 for an exact error function, with the sum and the two products; 15 more backward.
    """
    n, vector = tokens * inner, inner * parameter
    gradients = vector * max(1, groups) * trained
    each = n * size
    return Cost(2 * each + vector, 3 * each + vector + gradients, 28 * n, 43 * n)


def embedding(
    *,
    tokens: int,
    width: int,
    words: int,
    longest: int,
    tables: tuple[int, int, int],
    size: int,
    parameter: int,
    masked: bool,
    groups: int = 0,
    slots: bool = False,
    trained: bool = True,
) -> Cost:
    """Forward: every row of a table that is used in once, out out. Backward: gradient and those rows in, dense
    gradients of the tables out.

    words: different ones in the batch. longest: tokens of the longest row. tables: rows of the word, position and type
    table. With slots the word table's gradient has the `words` rows of each group.
    FLOPs: two sums and LayerNorm as in `add_layer_norm`.
    """
    vocabulary, positions, types = tables
    n, row = tokens * width, width * parameter
    used = (words + min(positions, longest) + types + 2) * row
    indices = tokens * INDEX * (3 + masked)
    dense = (words if slots else vocabulary) + positions + types + 2
    gradients = dense * row * max(1, groups) * trained
    out = n * size
    return Cost(used + indices + out, (used + indices + out + gradients) * trained, 10 * n, 15 * n)


def linear(
    *,
    rows: int,
    inputs: int,
    outputs: int,
    size: int,
    parameter: int,
    groups: int = 0,
    needs_input: bool = True,
    trained: bool = True,
) -> Cost:
    """Forward: x and the weight in, out out. Backward: the output's gradient in, with the weight for the input's
    gradient (`needs_input`) and with x for the weight's (`trained`). The weight is read as it is kept.

    FLOPs: 2 a product of elements, for each of the three matrix products.
    """
    product = 2.0 * rows * inputs * outputs
    x, y, weight = rows * inputs * size, rows * outputs * size, inputs * outputs * parameter
    backward = (weight + x) * needs_input + (x + weight * max(1, groups)) * trained
    return Cost(
        x + weight + y, (y + backward) * (needs_input or trained), product, product * (needs_input + trained)
    )


def adapter(
    *,
    rows: int,
    inputs: int,
    outputs: int,
    rank: int,
    size: int,
    parameter: int,
    groups: int = 0,
    needs_input: bool = True,
) -> Cost:
    """A trained low-rank update beside a product that reads x and writes out anyway: two thin products forward, and
    two for each of them backward (three together where the gradient of x is not needed). It moves its matrices alone.
    """
    thin_in, thin_out = 2.0 * rows * inputs * rank, 2.0 * rows * rank * outputs
    matrices = (inputs + outputs) * rank * parameter
    kept = rows * rank * size
    return Cost(
        matrices + kept,
        matrices * (1 + max(1, groups)) + kept,
        thin_in + thin_out,
        thin_in * (1 + needs_input) + 2 * thin_out,
    )
