"""Softmax of rows with their own lengths, and dropout, in one kernel each way.

Rows of at most 4096 columns lie in one tile and are read once. Bytes moved, for elements of s bytes: the forward pass
reads and writes an element once, 2 s, the backward pass reads x and the output's gradient and writes that of x, 3 s;
beside them 8 bytes a row for its maximum and sum. That is the least there is, since the probabilities are not kept:
the backward pass computes them from x, unrounded. Columns beyond a row's length are written, not read. Longer rows
are read twice each way, the second time from the cache as a rule.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..philox import Dropout
from .launch import MASK_SCALARS, blocks, kept_scale, launch, mask_arguments, power_of_two
from .philox import keep_mask

_WIDEST = 4096
"""Columns of the widest tile."""
_TILE = 2048
"""Elements of a tile of short rows."""
_WARP = 1024
"""Bytes of a warp: of each operand 32 a thread, two loads."""


def softmax(x: Tensor, lengths: Tensor | None, dropout_row: Tensor | None, dropout: Dropout | None) -> Tensor:
    """The probabilities of x [M, C]; lengths, dropout_row: int32 [M]."""
    return _softmax(x, lengths, dropout_row, *mask_arguments(dropout))[0]


@torch.library.custom_op("mtbert::softmax", mutates_args=())
def _softmax(
    x: Tensor, lengths: Tensor | None, dropout_row: Tensor | None, mask: list[int], step: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The probabilities, and the maximum and the sum of each row's exponentials, float32 [M]."""
    out, peak, total = _outputs(x)
    if x.numel() > 0:
        kernel = softmax_forward_tile if x.shape[1] <= _WIDEST else softmax_forward_loop
        _run(kernel, x, lengths, (out, peak, total), dropout_row, mask, step)
    return out, peak, total


def _outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    return (
        torch.empty_like(x),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
    )


@_softmax.register_fake
def _(
    x: Tensor, lengths: Tensor | None, dropout_row: Tensor | None, mask: list[int], step: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x)


@torch.library.custom_op("mtbert::softmax_backward", mutates_args=())
def _softmax_backward(
    dout: Tensor,
    x: Tensor,
    lengths: Tensor | None,
    peak: Tensor,
    total: Tensor,
    dropout_row: Tensor | None,
    mask: list[int],
    step: Tensor | None,
) -> Tensor:
    dx = torch.empty_like(x)
    if x.numel() > 0:
        kernel = softmax_backward_tile if x.shape[1] <= _WIDEST else softmax_backward_loop
        _run(kernel, x, lengths, (dout, dx, peak, total), dropout_row, mask, step)
    return dx


@_softmax_backward.register_fake
def _(
    dout: Tensor,
    x: Tensor,
    lengths: Tensor | None,
    peak: Tensor,
    total: Tensor,
    dropout_row: Tensor | None,
    mask: list[int],
    step: Tensor | None,
) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, lengths, dropout_row, mask, step = inputs
    _, peak, total = output
    ctx.save_for_backward(x, lengths, peak, total, dropout_row, step)
    ctx.mask = mask
    ctx.mark_non_differentiable(peak, total)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None, None, None]:
    if dout is None:
        return None, None, None, None, None
    x, lengths, peak, total, dropout_row, step = ctx.saved_tensors
    dx = _softmax_backward(dout.contiguous(), x, lengths, peak, total, dropout_row, ctx.mask, step)
    return dx, None, None, None, None


_softmax.register_autograd(_gradients, setup_context=_save)


def _run(
    kernel: Any,
    x: Tensor,
    lengths: Tensor | None,
    between: tuple[Tensor, ...],
    dropout_row: Tensor | None,
    mask: list[int],
    step: Tensor | None,
) -> None:
    rows, columns = x.shape
    block_columns = min(_WIDEST, max(8, power_of_two(columns)))
    block_rows = max(1, _TILE // block_columns)
    arguments = (x, lengths, *between, dropout_row, rows, columns, *mask, step, kept_scale(mask[4]))
    launch(
        kernel,
        (blocks(rows, block_rows),),
        *arguments,
        ROWS=block_rows,
        COLUMNS=block_columns,
        DROPOUT=dropout_row is not None,
        num_warps=block_rows * block_columns * x.itemsize // _WARP,
    )


@triton.jit
def _row_lengths(lengths, row, rows, columns):
    """The length of each row of a tile, int32."""
    if lengths is None:
        return tl.zeros_like(row) + columns
    return tl.load(lengths + row, mask=row < rows, other=0)


@triton.jit
def _read(pointer, written, column, length, inside, other):
    """Float32 elements, `other` where they are not inside.

    Eight neighbours are loaded or not loaded together: a condition of each element's own would load each by itself.
    """
    value = tl.load(pointer, mask=written & (column // 8 * 8 < length), other=0.0)
    return tl.where(inside, value.to(tl.float32), other)


@triton.jit(do_not_specialize=["rows", *MASK_SCALARS])
def softmax_forward_tile(
    x,
    lengths,
    out,
    peak,
    total,
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
    DROPOUT: tl.constexpr,
):
    """ROWS whole rows a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    written = (row < rows)[:, None] & (column < columns)[None, :]
    length = _row_lengths(lengths, row, rows, columns)[:, None]
    inside = written & (column[None, :] < length)
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    # Drawn first, so that its registers are free again for the rows.
    if DROPOUT:
        kept = keep_mask(
            tl.load(dropout_row + row, mask=row < rows, other=0),
            0,
            seed_low,
            seed_high,
            step,
            site,
            threshold,
            step_pointer,
            COLUMNS // 8,
        )
    score = _read(x + offset, written, column[None, :], length, inside, -float("inf"))
    highest = tl.max(score, axis=1)
    power = tl.where(inside, tl.exp(score - highest[:, None]), 0.0)
    sum = tl.sum(power, axis=1)
    tl.store(peak + row, highest, mask=row < rows)
    tl.store(total + row, sum, mask=row < rows)
    value = power * tl.div_rn(1.0, sum)[:, None]
    wanted = inside
    if DROPOUT:
        wanted = inside & kept
        value *= scale
    # An empty row divides by zero; none of its columns is inside.
    tl.store(out + offset, tl.where(wanted, value, 0.0).to(out.dtype.element_ty), mask=written)


@triton.jit
def _power_and_gradient(
    x,
    dout,
    offset,
    written,
    column,
    length,
    highest,
    mask_row,
    first_group,
    seed_low,
    seed_high,
    step,
    site,
    threshold,
    step_pointer,
    scale,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """The exponentials of a tile and the probabilities' gradients, float32; zeros beyond the rows' lengths."""
    inside = written & (column < length)
    wanted = inside
    if DROPOUT:
        kept = keep_mask(
            mask_row,
            first_group,
            seed_low,
            seed_high,
            step,
            site,
            threshold,
            step_pointer,
            COLUMNS // 8,
        )
        wanted = inside & kept
    gradient = _read(dout + offset, written, column, length, wanted, 0.0)
    if DROPOUT:
        gradient *= scale
    score = _read(x + offset, written, column, length, inside, 0.0)
    return tl.where(inside, tl.exp(score - highest[:, None]), 0.0), gradient


@triton.jit(do_not_specialize=["rows", *MASK_SCALARS])
def softmax_backward_tile(
    x,
    lengths,
    dout,
    dx,
    peak,
    total,
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
    DROPOUT: tl.constexpr,
):
    """ROWS whole rows a program: dx = P (g - sum(P g)), g being the probabilities' gradient.

    The sum is divided once, not each P in it: rounded probabilities do not add up to 1, which the difference shows.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    written = (row < rows)[:, None] & (column < columns)[None, :]
    length = _row_lengths(lengths, row, rows, columns)[:, None]
    inside = written & (column[None, :] < length)
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    sum = tl.load(total + row, mask=row < rows, other=1.0)
    inverse = tl.div_rn(1.0, sum)
    power, gradient = _power_and_gradient(
        x,
        dout,
        offset,
        written,
        column[None, :],
        length,
        tl.load(peak + row, mask=row < rows, other=0.0),
        tl.load(dropout_row + row, mask=row < rows, other=0) if DROPOUT else row,
        0,
        seed_low,
        seed_high,
        step,
        site,
        threshold,
        step_pointer,
        scale,
        COLUMNS,
        DROPOUT,
    )
    mean = tl.div_rn(tl.sum(power * gradient, axis=1), sum)
    # Selected, not left to the exponentials of 0: the row's mean may be NaN.
    value = tl.where(inside, power * inverse[:, None] * (gradient - mean[:, None]), 0.0)
    tl.store(dx + offset, value.to(dx.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["rows", *MASK_SCALARS])
def softmax_forward_loop(
    x,
    lengths,
    out,
    peak,
    total,
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
    DROPOUT: tl.constexpr,
):
    """ROWS long rows a program, COLUMNS at a time: maximum and sum together in a first pass."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    length = _row_lengths(lengths, row, rows, columns)[:, None]
    base = row.to(tl.int64)[:, None] * columns
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    sum = tl.zeros([ROWS], tl.float32)
    for first in range(0, columns, COLUMNS):
        position = first + column[None, :]
        written = (row < rows)[:, None] & (position < columns)
        inside = written & (position < length)
        score = _read(x + base + position, written, position, length, inside, -float("inf"))
        before = highest
        highest = tl.maximum(highest, tl.max(score, axis=1))
        # Nothing but -inf so far: there is nothing to scale or to add, and -inf - -inf is NaN.
        scaling = tl.where(before == highest, 1.0, tl.exp(before - highest))
        power = tl.where(score == -float("inf"), 0.0, tl.exp(score - highest[:, None]))
        sum = sum * scaling + tl.sum(power, axis=1)
    tl.store(peak + row, highest, mask=row < rows)
    tl.store(total + row, sum, mask=row < rows)
    inverse = tl.div_rn(1.0, sum)
    for first in range(0, columns, COLUMNS):
        position = first + column[None, :]
        written = (row < rows)[:, None] & (position < columns)
        inside = written & (position < length)
        score = _read(x + base + position, written, position, length, inside, 0.0)
        value = tl.exp(score - highest[:, None]) * inverse[:, None]
        if DROPOUT:
            kept = keep_mask(
                tl.load(dropout_row + row, mask=row < rows, other=0),
                first // 8,
                seed_low,
                seed_high,
                step,
                site,
                threshold,
                step_pointer,
                COLUMNS // 8,
            )
            inside = inside & kept
            value *= scale
        tl.store(out + base + position, tl.where(inside, value, 0.0).to(out.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["rows", *MASK_SCALARS])
def softmax_backward_loop(
    x,
    lengths,
    dout,
    dx,
    peak,
    total,
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
    DROPOUT: tl.constexpr,
):
    """As `softmax_backward_tile`, COLUMNS at a time: the sum in a first pass, the gradient in a second."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    length = _row_lengths(lengths, row, rows, columns)[:, None]
    base = row.to(tl.int64)[:, None] * columns
    highest = tl.load(peak + row, mask=row < rows, other=0.0)
    sum = tl.load(total + row, mask=row < rows, other=1.0)
    inverse = tl.div_rn(1.0, sum)
    mean = tl.zeros([ROWS], tl.float32)
    mask_row = tl.load(dropout_row + row, mask=row < rows, other=0) if DROPOUT else row
    for second in tl.static_range(2):
        for first in range(0, columns, COLUMNS):
            position = first + column[None, :]
            written = (row < rows)[:, None] & (position < columns)
            inside = written & (position < length)
            power, gradient = _power_and_gradient(
                x,
                dout,
                base + position,
                written,
                position,
                length,
                highest,
                mask_row,
                first // 8,
                seed_low,
                seed_high,
                step,
                site,
                threshold,
                step_pointer,
                scale,
                COLUMNS,
                DROPOUT,
            )
            if second:
                value = tl.where(inside, power * inverse[:, None] * (gradient - mean[:, None]), 0.0)
                tl.store(dx + base + position, value.to(dx.dtype.element_ty), mask=written)
            else:
                mean += tl.div_rn(tl.sum(power * gradient, axis=1), sum)
