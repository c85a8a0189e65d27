"""What the launchers share: the launch itself, how a mask travels to a kernel, sizes of tiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..philox import Dropout

Mask = tuple[list[int], Tensor | None]
"""A `Dropout` as arguments of a custom operator: see `mask_arguments`."""

MASK_SCALARS = ["seed_low", "seed_high", "step", "site", "threshold"]
"""The mask's arguments of every kernel. They change from call to call and must not be compiled in, so every kernel
names them in `do_not_specialize`."""


def mask_arguments(dropout: Dropout | None) -> Mask:
    """The five words of MASK_SCALARS as signed 32-bit numbers, and the step where it lies on the device.

    Signed, because Triton types an integer by its value: all of these are i32, whatever the seed. No dropout is a
    threshold of 0.
    """
    if dropout is None:
        return [0, 0, 0, 0, 0], None
    on_device = isinstance(dropout.step, Tensor)
    step = 0 if isinstance(dropout.step, Tensor) else dropout.step
    words = [dropout.seed & 0xFFFFFFFF, dropout.seed >> 32, step, dropout.site, dropout.threshold]
    return [_signed(word) for word in words], dropout.step if on_device else None  # type: ignore[return-value]


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def kept_scale(threshold: int) -> float:
    """What kept elements are multiplied by."""
    return 65536 / (65536 - threshold)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as it was asked for."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    """The compile-time arguments, num_warps and num_stages."""


_record: list[Launch] | None = None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Note the launches within a `with` block instead of making them: what would be compiled, without a GPU."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a Triton kernel on the device of its first argument, a tensor."""
    if _record is not None:
        _record.append(Launch(kernel, grid, arguments, options))
        return
    first = arguments[0]
    # Under the interpreter the tensors lie in host memory.
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid](*arguments, **options)


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)
