"""Bias and exact GELU: an elementwise kernel forward, one kernel and a reduction backward.

Bytes moved for each element of s bytes: forward reads x and writes the result, 2 s; backward reads x and the result's
gradient and writes that of x, 3 s. That is the least there is when only x is kept. Beside them, backward, the partial
sums of the bias's gradient: 4 bytes for each column and 64 rows, written and read, 1% or 2% of the whole.

On a GPU as fast as its memory a half-width element may cost about 25 instructions forward. Phi is therefore written as
few of them, in a form that keeps its relative accuracy in the left tail, where 1 + erf would cancel: with a = |z| and
q(a) = Phi(-a), z Phi(z) = max(z, 0) - a q(a).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grouped import deliver
from .launch import blocks, launch, power_of_two
from .sums import add_partials

_ROWS = 8
_WIDEST = 256
"""Columns of a tile: as many as a warp reads at once of half-width numbers, 16 bytes a thread."""
_ROWS_OF_PROGRAM = 64
"""Backward: a partial sum for each so many rows."""


def bias_gelu(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    companions: Sequence[Tensor | None],
    bounds: Tensor | None,
    groups: int,
) -> Tensor:
    """z Phi(z) of z = x + bias, x [T, F].

    parameters: the bias [F]; companions: its own, [groups, F], or None; bounds: int32 [groups + 1] on the device of x,
    or None for one group of all rows.
    """
    return _bias_gelu(x, *parameters, *companions, bounds, groups)


@torch.library.custom_op("mtbert::bias_gelu", mutates_args=())
def _bias_gelu(
    x: Tensor, bias: Tensor, companion: Tensor | None, bounds: Tensor | None, groups: int
) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    rows, width = x.shape
    columns = min(_WIDEST, power_of_two(width))
    launch(
        bias_gelu_forward,
        (blocks(rows, _ROWS) * blocks(width, columns),),
        x,
        bias,
        out,
        rows,
        WIDTH=width,
        ROWS=_ROWS,
        COLUMNS=columns,
        PRECISE=x.dtype == torch.float32,
    )
    return out


@_bias_gelu.register_fake
def _(x: Tensor, bias: Tensor, companion: Tensor | None, bounds: Tensor | None, groups: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("mtbert::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(
    dout: Tensor, x: Tensor, bias: Tensor, bounds: Tensor | None, groups: int, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """The gradients of x [T, F] and of the bias [groups, F] where needed, else empty ones."""
    dx, dbias = _gradient_outputs(x, bias, groups, needs)
    if x.numel() == 0:
        return dx, dbias.zero_()
    rows, width = x.shape
    columns = min(_WIDEST, power_of_two(width))
    programs = blocks(rows, _ROWS_OF_PROGRAM * groups)
    partials = x.new_empty(int(needs[1]), groups, programs, width, dtype=torch.float32)
    launch(
        bias_gelu_backward,
        (programs * blocks(width, columns), groups),
        dout,
        x,
        bias,
        dx if needs[0] else None,
        partials if needs[1] else None,
        bounds,
        rows,
        programs,
        WIDTH=width,
        ROWS=_ROWS,
        COLUMNS=columns,
        PRECISE=x.dtype == torch.float32,
    )
    if needs[1]:
        (dbias,) = add_partials(partials, [bias.dtype])
    return dx, dbias


def _gradient_outputs(x: Tensor, bias: Tensor, groups: int, needs: list[bool]) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    dx = x.new_empty((rows, width) if needs[0] else 0)
    return dx, bias.new_empty((groups, width) if needs[1] else 0)


@_bias_gelu_backward.register_fake
def _(
    dout: Tensor, x: Tensor, bias: Tensor, bounds: Tensor | None, groups: int, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    return _gradient_outputs(x, bias, groups, needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, _, bounds, groups = inputs
    ctx.save_for_backward(x, bias, bounds)
    ctx.groups = groups


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, bias, bounds = ctx.saved_tensors
    need_x, need_bias, need_companion = ctx.needs_input_grad[:3]
    needs = [need_x, need_bias or need_companion]
    dx, dbias = _bias_gelu_backward(dout.contiguous(), x, bias, bounds, ctx.groups, needs)
    sums = deliver([dbias if needs[1] else None], [need_bias], [need_companion])
    return dx if need_x else None, *sums, None, None


_bias_gelu.register_autograd(_gradients, setup_context=_save)


@triton.jit
def _upper_tail(a, PRECISE: tl.constexpr):
    """q(a) = Phi(-a) and exp(-a^2 / 2) of 0 <= a <= 14.3, where both end in zeros.

    PRECISE: q to a relative error of 5e-7, which grows to 8e-6 at 1e-30 by the rounding of a^2, as
    exp(-a^2 / 2) t P(t) with t = 1 / (1 + 0.35 a). Else to 7e-5 above 1e-9 and 5e-4 above 1e-35, a sixth of the
    rounding to float16 (which ends at 6e-8) and to bfloat16, as the power of two of a polynomial. Both are minimax fits
    of the relative error.
    """
    gauss = tl.exp2(a * a * -0.7213475204444817)
    if PRECISE:
        t = 1.0 / (1.0 + 0.35 * a)
        tail = -0.0291653648
        tail = tail * t + 0.144067913
        tail = tail * t - 0.255916834
        tail = tail * t + 0.159410343
        tail = tail * t - 0.0232761092
        tail = tail * t + 0.105580129
        tail = tail * t + 0.119814113
        tail = tail * t + 0.139864534
        tail = tail * t + 0.139621243
        return tail * t * gauss, gauss
    else:
        log = 3.20352278e-08
        log = log * a - 1.990182e-06
        log = log * a + 5.30358629e-05
        log = log * a - 0.00080277567
        log = log * a + 0.00776328193
        log = log * a - 0.0518715754
        log = log * a - 0.461188048
        log = log * a - 1.14992523
        log = log * a - 1.00010359
        return tl.exp2(log), gauss


@triton.jit
def _magnitude(z):
    """|z| up to where `_upper_tail` ends, NaN where z is."""
    return tl.minimum(tl.abs(z), 14.3, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tile(row, active, first, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns from `first` on of some rows: the columns [ROWS, COLUMNS], where they lie, which of them there are."""
    # A column for every row: the bias is then loaded as x is laid out over the threads, and shuffled between none.
    column = first + tl.arange(0, COLUMNS)[None, :] + tl.zeros([row.shape[0], 1], tl.int32)
    return column, (row.to(tl.int64) * WIDTH)[:, None] + column, active[:, None] & (column < WIDTH)


@triton.jit(do_not_specialize=["rows"])
def bias_gelu_forward(
    x,
    bias,
    out,
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """One tile [ROWS, COLUMNS] a program; the programs of one row of tiles follow each other."""
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    column, offset, inside = _tile(row, row < rows, tl.program_id(0) % across * COLUMNS, COLUMNS, WIDTH)
    shift = tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    z = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) + shift
    a = _magnitude(z)
    tail, _ = _upper_tail(a, PRECISE)
    value = tl.maximum(z, 0.0) - a * tail
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "programs"])
def bias_gelu_backward(
    dout,
    x,
    bias,
    dx,
    partials,
    bounds,
    rows,
    programs,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """COLUMNS columns of every so many rows of one group a program, and its part in their sums, partials[group, p]."""
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0) // across
    first = tl.program_id(0) % across * COLUMNS
    group = tl.program_id(1)
    low = 0
    high = rows
    if bounds is not None:
        low = tl.load(bounds + group)
        high = tl.load(bounds + group + 1)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(low + program * ROWS, high, programs * ROWS):
        row = begin + tl.arange(0, ROWS)
        column, offset, inside = _tile(row, row < high, first, COLUMNS, WIDTH)
        shift = tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        z = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) + shift
        a = _magnitude(z)
        tail, gauss = _upper_tail(a, PRECISE)
        # Phi(z) + z phi(z) below zero; the two sides add up to 1.
        below = tail - a * gauss * 0.3989422804014327
        slope = tl.where(z > 0.0, 1.0 - below, below)
        gradient = tl.load(dout + offset, mask=inside, other=0.0).to(tl.float32) * slope
        if dx is not None:
            tl.store(dx + offset, gradient.to(dx.dtype.element_ty), mask=inside)
        total += gradient
    if partials is not None:
        column = first + tl.arange(0, COLUMNS)
        place = (group.to(tl.int64) * programs + program) * WIDTH
        tl.store(partials + place + column, tl.sum(total, 0), mask=column < WIDTH)
