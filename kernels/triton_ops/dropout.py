"""Dropout of a matrix as one elementwise kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..philox import Dropout
from .launch import MASK_SCALARS, blocks, kept_scale, launch, mask_arguments, power_of_two
from .philox import keep_mask

_TILE = 4096
"""Elements of a tile: 32 a thread with four warps."""
_WIDEST = 512


def dropout(x: Tensor, dropout_row: Tensor, dropout: Dropout) -> Tensor:
    """The masked and scaled copy of x [T, C]; dropout_row: int32 [T]."""
    return _dropout(x, dropout_row, *mask_arguments(dropout))


@torch.library.custom_op("mtbert::dropout", mutates_args=())
def _dropout(x: Tensor, dropout_row: Tensor, mask: list[int], step: Tensor | None) -> Tensor:
    out = torch.empty_like(x)
    rows, columns = x.shape
    if x.numel() == 0:
        return out
    block_columns = min(_WIDEST, max(8, power_of_two(columns)))
    block_rows = _TILE // block_columns
    grid = (blocks(rows, block_rows), blocks(columns, block_columns))
    launch(
        dropout_kernel,
        grid,
        x,
        out,
        dropout_row,
        rows,
        columns,
        *mask,
        step,
        kept_scale(mask[4]),
        ROWS=block_rows,
        COLUMNS=block_columns,
    )
    return out


@_dropout.register_fake
def _(x: Tensor, dropout_row: Tensor, mask: list[int], step: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@triton.jit(do_not_specialize=["rows", *MASK_SCALARS])
def dropout_kernel(
    x,
    out,
    dropout_row,
    rows,
    columns,
    seed_low,
    seed_high,
    step,
    site,
    threshold,
    step_pointer,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile [ROWS, COLUMNS] a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    kept = keep_mask(
        tl.load(dropout_row + row, mask=row < rows, other=0),
        tl.program_id(1) * (COLUMNS // 8),
        seed_low,
        seed_high,
        step,
        site,
        threshold,
        step_pointer,
        COLUMNS // 8,
    )
    # Selected after the load: a condition of each element's own would load each by itself.
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(out + offset, tl.where(kept, value, 0.0).to(out.dtype.element_ty), mask=inside)
