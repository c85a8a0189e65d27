"""How fast this machine multiplies matrices and copies memory: the limits that a step is measured against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtbert.engine.flops import EncoderSizes

_COPY_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}
"""Several times what any cache holds."""
_SECONDS = 0.3
"""How long a rate is measured, after the fastest way has been found."""
_PARTS = 5


@dataclass(frozen=True)
class Work:
    """Something to run again and again, with what one run amounts to."""

    run: Callable[[], object]
    amount: float
    """FLOPs, or bytes read plus bytes written."""


@dataclass(frozen=True)
class Peaks:
    """The measured limits of a device; None where the memory did not suffice to measure."""

    flops: float | None
    """FLOP a second of matrix products in `dtype`."""
    bytes: float | None
    """Bytes a second of a plain copy, read plus written."""
    dtype: str


def measure_peaks(device: torch.device, dtype: torch.dtype, sizes: EncoderSizes, tokens: int) -> Peaks:
    """Both limits, in about a second. The products are large squares, and on a GPU those of a step of `tokens`, too.

    torch's own random numbers are left alone: a run that measures stays the run that it is.
    """
    flops = _rate(lambda: fastest_product(device, dtype, limit_shapes(device, sizes, tokens)), device)
    copied = _rate(lambda: plain_copy(device), device)
    return Peaks(flops, copied, str(dtype).removeprefix("torch."))


def fastest_product(device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]]) -> Work:
    """The matrix product that torch does at the highest rate here, of `shapes` (m, n, k) in both layouts of the second
    factor. Raises ValueError without a shape.
    """
    best: tuple[float, Work] | None = None
    for m, n, k in shapes:
        a, b = _numbers(m, k, device, dtype), _numbers(n, k, device, dtype)
        for second in (b.t(), b.t().contiguous()):
            out = torch.empty(m, n, device=device, dtype=dtype)

            def multiply(a: Tensor = a, second: Tensor = second, out: Tensor = out) -> Tensor:
                return torch.mm(a, second, out=out)

            multiply()
            work = Work(multiply, 2.0 * m * n * k)
            rate = work.amount / min(seconds(multiply, device) for _ in range(3))
            if best is None or rate > best[0]:
                best = rate, work
    if best is None:
        raise ValueError("fastest_product needs a shape")
    return best[1]


def plain_copy(device: torch.device) -> Work:
    """A copy of a tensor that no cache holds."""
    source = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return Work(lambda: target.copy_(source), 2.0 * source.numel() * source.element_size())


def limit_shapes(device: torch.device, sizes: EncoderSizes, tokens: int) -> list[tuple[int, int, int]]:
    """Products that show the limit: large squares, and on a GPU also the step's own."""
    if device.type != "cuda":
        return [(2048, 2048, 2048)]
    c, f = sizes.width, sizes.inner
    return [(8192, 8192, 8192), (tokens, 3 * c, c), (tokens, f, c), (tokens, c, f)]


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds on the wall that the device needs for `call`."""
    synchronise(device)
    begin = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - begin


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rate(make: Callable[[], Work], device: torch.device) -> float | None:
    """Work a second: the median of some parts of the time, so that a moment's other load does not count."""
    try:
        work = make()
        once = min(seconds(work.run, device) for _ in range(3))
        times = max(1, round(_SECONDS / _PARTS / once))

        def part() -> None:
            for _ in range(times):
                work.run()

        return times * work.amount / statistics.median(seconds(part, device) for _ in range(_PARTS))
    except (torch.OutOfMemoryError, MemoryError):
        return None


def _numbers(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[rows, columns], normal, from a generator of their own."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.empty(rows, columns, device=device).normal_(generator=generator).to(dtype)
