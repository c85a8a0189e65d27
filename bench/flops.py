"""How much arithmetic a training step needs, and how fast this machine multiplies matrices."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bench.measure import Side

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


def product_side(
    name: str, device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]]
) -> Side:
    """A side that multiplies matrices as fast as torch does here: its rate is the limit in FLOP/s.

    `shapes` are (m, n, k). The fastest of them, in the fastest of the two layouts of the second factor, is found
    when the side is built; the side then measures that one.
    """
    best: tuple[float, Callable[[], Tensor], float] | None = None
    for m, n, k in shapes:
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn(n, k, device=device).to(dtype)
        for second in (b.t(), b.t().contiguous()):
            out = torch.empty(m, n, device=device, dtype=dtype)

            def multiply(a: Tensor = a, second: Tensor = second, out: Tensor = out) -> Tensor:
                return torch.mm(a, second, out=out)

            multiply()
            seconds = min(_seconds(multiply, device) for _ in range(3))
            flops = 2.0 * m * n * k
            if best is None or flops / seconds > best[0]:
                best = flops / seconds, multiply, flops
    if best is None:
        raise ValueError("product_side needs a shape")
    rate, fastest, flops = best
    times = max(1, round(0.3 * rate / flops))

    def run(repeat: int) -> float:
        for _ in range(times):
            fastest()
        return times * flops

    return Side(name, run)


def limit_shapes(device: torch.device, sizes: EncoderSizes, tokens: int) -> list[tuple[int, int, int]]:
    """Products that show the limit: large squares, and on a GPU also the step's own."""
    if device.type != "cuda":
        return [(2048, 2048, 2048)]
    c, f = sizes.width, sizes.inner
    return [(8192, 8192, 8192), (tokens, 3 * c, c), (tokens, f, c), (tokens, c, f)]


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    begin = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - begin


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
