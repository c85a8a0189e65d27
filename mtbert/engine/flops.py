"""How much arithmetic a training step needs, by formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Pass = Literal["full", "lora", "features"]


@dataclass(frozen=True)
class EncoderSizes:
    """What the count depends on."""

    layers: int
    width: int
    inner: int


def projection_shapes(sizes: EncoderSizes) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of a layer's six projections."""
    c, f = sizes.width, sizes.inner
    square = dict.fromkeys(("query", "key", "value", "attention_output"), (c, c))
    return {**square, "intermediate": (c, f), "output": (f, c)}


def training_flops(
    sizes: EncoderSizes, row_lengths: np.ndarray, mode: Pass, *, rank: int = 0, adapted: Sequence[str] = ()
) -> float:
    """FLOPs of the encoder's matrix products in a step over rows of these lengths; a product of [m, k] and
    [k, n] counts 2 m k n.

    With T tokens, a projection of K inputs and N outputs needs 2 T K N forward, as much for the gradient of its
    input, and as much for that of its weight. Attention over a row of L tokens needs two products of
    2 L^2 C forward (Q K^T, P V) and four backward (dV, dP, dQ, dK).

    full:     every product forward and backward.
    lora:     forward, and the gradients of inputs; no gradient of a frozen weight; each adapter of rank r on
              top: 2 T r (K + N), three times. In the first layer the gradient of the input of query, key and
              value is not needed, as nothing trains below. All layers are adapted, query or value among others.
    features: forward only (the frozen encoder's one pass).

    It is the plain algorithm's count: neither embedding, LayerNorm, softmax and heads, which are no matrix
    products of weight, nor recomputation, nor work that an implementation finds a way to leave out.
    """
    lengths = np.asarray(row_lengths, dtype=np.float64)
    tokens, squares = float(lengths.sum()), float((lengths**2).sum())
    shapes = projection_shapes(sizes)
    forward = 2 * tokens * sum(k * n for k, n in shapes.values())
    product = 2 * squares * sizes.width  # one of attention's
    if mode == "features":
        return sizes.layers * (forward + 2 * product)
    if mode == "full":
        return sizes.layers * (3 * forward + 6 * product)
    adapters = 3 * 2 * tokens * rank * sum(sum(shapes[name]) for name in adapted)
    c = sizes.width
    unneeded = (
        2 * tokens * (3 * c * c + rank * c * sum(name in adapted for name in ("query", "key", "value")))
    )
    return sizes.layers * (2 * forward + 6 * product + adapters) - unneeded
