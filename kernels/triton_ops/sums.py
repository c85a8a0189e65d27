"""Sums over rows in two deterministic steps: every program of a kernel writes a partial sum, a second kernel adds them.

A gradient of a parameter is a sum over all rows, or over the rows of each group. Atomic additions would be in another
order every time; here the order follows from the sizes alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import blocks, launch

_ROWS, _COLUMNS, _WARPS = 512, 16, 8
"""A tile of partial sums: few columns, so that three sums of 768 columns occupy a whole GPU, and 32 a thread."""
_PROCESSORS = 132
"""Those of an H200: what is assumed where there is no GPU to ask."""


def processors(device: torch.device) -> int:
    """The number of multiprocessors: a property of the device, known to the host."""
    if device.type != "cuda":
        return _PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def add_partials(partials: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The sums over axis 2 of partials, float32 [S, K, P, C], contiguous, S = len(dtypes) at most 3.

    Returns S tensors [K, C], the s-th in dtypes[s], added in float32.
    """
    count, groups, programs, columns = partials.shape
    sums = [partials.new_empty(groups, columns, dtype=dtype) for dtype in dtypes]
    if partials.numel() == 0:
        return [s.zero_() for s in sums]
    first, second, third = [*sums, None, None][:3]
    grid = (blocks(columns, _COLUMNS), groups, count)
    launch(
        add_partials_kernel,
        grid,
        partials,
        first,
        second,
        third,
        groups,
        programs,
        columns,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=_WARPS,
    )
    return sums


@triton.jit
def _write(target, place, value, inside):
    if target is not None:
        tl.store(target + place, value.to(target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["groups", "programs"])
def add_partials_kernel(
    partials,
    first,
    second,
    third,
    groups,
    programs,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One block of columns of one sum of one group a program; first, second, third: where the sums go, or None."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    group = tl.program_id(1)
    which = tl.program_id(2)
    start = partials + (which * groups + group).to(tl.int64) * programs * columns
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, programs, ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = (row < programs)[:, None] & (column < columns)[None, :]
        total += tl.load(
            start + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0.0
        )
    value = tl.sum(total, 0)
    place = group.to(tl.int64) * columns + column
    if which == 0:
        _write(first, place, value, column < columns)
    if which == 1:
        _write(second, place, value, column < columns)
    if which == 2:
        _write(third, place, value, column < columns)
