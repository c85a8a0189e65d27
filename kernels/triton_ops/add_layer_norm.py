"""LayerNorm(residual + dropout(x + linear_bias)): one kernel forward, one kernel and a reduction backward.

A program holds whole rows in registers, so every operand is read once. The mask and the normalised rows are computed
again in the backward pass instead of being kept. Bytes moved for each element of s bytes, with nothing frozen: forward
reads x and residual and writes the result, 3 s; backward reads x, residual and the result's gradient and writes two
gradients, 5 s (4 s without dropout, where the two are one). That is the least there is when x and residual are what
is kept. Beside them 12 bytes a row (mean, rstd and the mask's row) and, backward, 12 bytes a column and program for the
partial sums, written and read. Those stay in a level 2 cache of 10 MB: at 768 columns in bfloat16 they are 15% of the
other bytes at 8,192 rows, and 2% at 65,536.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grouped import deliver
from ..philox import Dropout
from .launch import MASK_SCALARS, blocks, kept_scale, launch, mask_arguments, power_of_two
from .philox import keep_mask
from .sums import add_partials, processors

_WIDEST_AT_ONCE = 4096
"""Columns of the widest rows whose backward pass is one launch."""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of x, residual, weight, bias, linear_bias; empty where not asked for. Those of parameters have a group axis."""


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    parameters: Sequence[Tensor | None],
    companions: Sequence[Tensor | None],
    eps: float,
    dropout_row: Tensor | None,
    dropout: Dropout | None,
    bounds: Tensor | None,
    groups: int,
) -> Tensor:
    """The normalised rows [T, C] of x and residual [T, C].

    parameters: weight, bias and linear_bias (or None), [C] each; companions: theirs, [groups, C] each, or None; bounds:
    int32 [groups + 1] on the device of x, or None for one group of all rows; dropout_row: int32 [T], or None where
    nothing is dropped.
    """
    mask, step = mask_arguments(dropout)
    leaves = (*parameters, *companions)
    return _add_layer_norm(x, residual, *leaves, bounds, groups, eps, dropout_row, mask, step)[0]


@torch.library.custom_op("mtbert::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    linear_bias: Tensor | None,
    weight_companion: Tensor | None,
    bias_companion: Tensor | None,
    linear_bias_companion: Tensor | None,
    bounds: Tensor | None,
    groups: int,
    eps: float,
    dropout_row: Tensor | None,
    mask: list[int],
    step: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the mean and the reciprocal standard deviation of every row, float32 [T]."""
    out, mean, rstd = _outputs(x)
    rows, width = x.shape
    if rows == 0:
        return out, mean, rstd
    main, rest = _parts(width)
    tile_rows, warps = _forward_tile(main)
    launch(
        add_layer_norm_forward,
        (blocks(rows, tile_rows),),
        x,
        residual,
        weight,
        bias,
        linear_bias,
        out,
        mean,
        rstd,
        dropout_row,
        rows,
        eps,
        *mask,
        step,
        kept_scale(mask[4]),
        WIDTH=width,
        ROWS=tile_rows,
        MAIN=main,
        REST=rest,
        DROPOUT=dropout_row is not None,
        num_warps=warps,
    )
    return out, mean, rstd


def _outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    return (
        torch.empty_like(x),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
    )


@_add_layer_norm.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x)


@torch.library.custom_op("mtbert::add_layer_norm_backward", mutates_args=())
def _add_layer_norm_backward(
    dout: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    linear_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    bounds: Tensor | None,
    groups: int,
    dropout_row: Tensor | None,
    mask: list[int],
    step: Tensor | None,
    needs: list[bool],
) -> Gradients:
    """What `needs` asks for; see `Gradients`."""
    dx, dresidual, *sums = _gradient_outputs(x, weight, bias, linear_bias, groups, needs)
    rows, width = x.shape
    asked = [i for i in range(3) if needs[2 + i]]
    if rows == 0:
        return dx, dresidual, *(s.zero_() for s in sums)  # type: ignore[return-value]
    main, rest = _parts(width)
    warps = _backward_warps(x, main, rest)
    programs = _programs(x, groups, main + rest, warps)
    partials = x.new_empty(len(asked), groups, programs, width, dtype=torch.float32)
    written = 0
    for part in _passes(main + rest, needs):
        launch(
            add_layer_norm_backward,
            (programs, groups),
            dout,
            x,
            residual,
            weight,
            linear_bias,
            mean,
            rstd,
            dx if part[0] else None,
            dresidual if part[1] else None,
            partials[written:],
            bounds,
            dropout_row,
            rows,
            *mask,
            step,
            kept_scale(mask[4]),
            WIDTH=width,
            MAIN=main,
            REST=rest,
            DROPOUT=dropout_row is not None,
            DWEIGHT=part[2],
            DBIAS=part[3],
            DLINEAR_BIAS=part[4],
            WIDE=main + rest > _WIDEST_AT_ONCE,
            num_warps=warps,
        )
        written += sum(part[2:])
    if asked:
        for i, added in zip(asked, add_partials(partials, [sums[i].dtype for i in asked]), strict=True):
            sums[i] = added
    return dx, dresidual, *sums  # type: ignore[return-value]


def _gradient_outputs(
    x: Tensor, weight: Tensor, bias: Tensor, linear_bias: Tensor | None, groups: int, needs: list[bool]
) -> Gradients:
    rows, width = x.shape
    dx, dresidual = (x.new_empty((rows, width) if needed else 0) for needed in needs[:2])
    dtypes = [x.dtype if p is None else p.dtype for p in (weight, bias, linear_bias)]
    dweight, dbias, dlinear_bias = (
        x.new_empty((groups, width) if needed else 0, dtype=dtype)
        for needed, dtype in zip(needs[2:], dtypes, strict=True)
    )
    return dx, dresidual, dweight, dbias, dlinear_bias


@_add_layer_norm_backward.register_fake
def _(
    dout: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    linear_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    bounds: Tensor | None,
    groups: int,
    dropout_row: Tensor | None,
    mask: list[int],
    step: Tensor | None,
    needs: list[bool],
) -> Gradients:
    return _gradient_outputs(x, weight, bias, linear_bias, groups, needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, linear_bias, *_, bounds, groups, _, dropout_row, mask, step = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, residual, weight, bias, linear_bias, mean, rstd, bounds, dropout_row, step)
    ctx.groups, ctx.mask = groups, mask
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 6
    if dout is None:
        return (None,) * 8 + nothing
    x, residual, weight, bias, linear_bias, mean, rstd, bounds, dropout_row, step = ctx.saved_tensors
    need_x, need_residual = ctx.needs_input_grad[:2]
    need_parameters, need_companions = ctx.needs_input_grad[2:5], ctx.needs_input_grad[5:8]
    # Without dropout the two gradients are one tensor, which is written once.
    apart = dropout_row is not None
    needs = [need_x and apart, need_residual or (need_x and not apart)]
    needs += [any(pair) for pair in zip(need_parameters, need_companions, strict=True)]
    arguments = (mean, rstd, bounds, ctx.groups, dropout_row, ctx.mask, step, needs)
    dx, dresidual, *sums = _add_layer_norm_backward(
        dout.contiguous(), x, residual, weight, bias, linear_bias, *arguments
    )
    if not apart:
        dx = dresidual
    asked = [s if needed else None for s, needed in zip(sums, needs[2:], strict=True)]
    return (
        dx if need_x else None,
        dresidual if need_residual else None,
        *deliver(asked, need_parameters, need_companions),
        *nothing,
    )


_add_layer_norm.register_autograd(_gradients, setup_context=_save)


def _parts(width: int) -> tuple[int, int]:
    """Columns of the one or two tiles of a row: its next power of two, or 3/4 of that as a half and a quarter."""
    whole = max(8, power_of_two(width))
    return (whole // 2, whole // 4) if whole >= 32 and width <= whole // 4 * 3 else (whole, 0)


def _forward_tile(main: int) -> tuple[int, int]:
    """Rows and warps of a program: 32 to 48 elements a thread, and where one warp does, no waiting of warps."""
    return max(1, 1024 // main), max(1, main // 1024)


def _backward_warps(x: Tensor, main: int, rest: int) -> int:
    """Warps of a program, which holds one row at a time: the narrower tile takes a load of 16 bytes a thread.

    That makes 4 to 24 elements a thread, each with its part of three sums in registers. Of very wide rows a thread
    holds 12 elements or, where 16 warps would not have registers enough, 32.
    """
    if main + rest > _WIDEST_AT_ONCE:
        return 16 if rest else 8
    return max(1, min(16, (rest or main) * x.element_size() // 512))


def _programs(x: Tensor, groups: int, columns: int, warps: int) -> int:
    """Programs for each group in the backward pass: no more than run at the same time, with 8 rows each or more."""
    share = columns // (32 * warps)
    resident = 8 if share > 16 else 12 if share > 8 else 16
    most = max(1, resident // warps) * processors(x.device)
    return max(1, min(most, blocks(x.shape[0], 8 * groups)))


def _passes(columns: int, needs: list[bool]) -> list[list[bool]]:
    """What each launch of the backward kernel computes of what is needed.

    All at once, but of very wide rows in two passes: a program has not registers enough for all of their sums.
    """
    if columns <= _WIDEST_AT_ONCE:
        return [needs]
    sums = [False, False, needs[2], needs[3], False]
    others = [needs[0], needs[1], False, False, needs[4]]
    return [part for part in (sums, others) if any(part)]


@triton.jit
def _parameter(pointer, ROWS: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """COLUMNS columns of a parameter from FIRST on, float32 [ROWS, COLUMNS].

    Loaded for every row, from the level 1 cache: a load of one row would be laid out over the threads in another way
    than the rows, and travel between threads by shuffles, which are dearer.
    """
    column = FIRST + tl.arange(0, COLUMNS)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    return tl.load(pointer + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _place(row, active, FIRST: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Where COLUMNS columns of some rows lie, int64 [ROWS, COLUMNS], and which of them there are."""
    column = FIRST + tl.arange(0, COLUMNS)[None, :]
    return (row.to(tl.int64) * WIDTH)[:, None] + column, active[:, None] & (column < WIDTH)


@triton.jit
def _kept(
    mask_row,
    seed_low,
    seed_high,
    step,
    site,
    threshold,
    step_pointer,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Which elements dropout keeps, bool [ROWS, COLUMNS]."""
    if DROPOUT:
        return keep_mask(
            mask_row, FIRST // 8, seed_low, seed_high, step, site, threshold, step_pointer, COLUMNS // 8
        )
    else:
        return tl.full([mask_row.shape[0], COLUMNS], True, tl.int1)


@triton.jit
def _shift(linear_bias, ROWS: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """What is added to x: COLUMNS of linear_bias from FIRST on, or 0 where there is none."""
    if linear_bias is not None:
        return _parameter(linear_bias, ROWS, FIRST, COLUMNS, WIDTH)
    else:
        return 0.0


@triton.jit
def _total(
    x,
    residual,
    shift,
    offset,
    inside,
    kept,
    scale,
    DROPOUT: tl.constexpr,
):
    """What is normalised: residual + dropout(x + shift), float32 [ROWS, COLUMNS], 0 beyond the width."""
    branch = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) + shift
    total = tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        # Chosen, not multiplied: what is dropped may be NaN.
        branch = tl.where(kept, branch * scale, 0.0)
    return total + branch


@triton.jit
def _squares(total, mean, FIRST: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """The sum of squared distances from the mean, [ROWS]."""
    distance = total - mean[:, None]
    if FIRST + COLUMNS > WIDTH:
        distance = tl.where(FIRST + tl.arange(0, COLUMNS)[None, :] < WIDTH, distance, 0.0)
    return tl.sum(distance * distance, 1)


@triton.jit
def _write_normed(
    out,
    total,
    mean,
    rstd,
    weight,
    bias,
    offset,
    inside,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    value = (
        (total - mean[:, None]) * rstd[:, None] * _parameter(weight, offset.shape[0], FIRST, COLUMNS, WIDTH)
    )
    value += _parameter(bias, offset.shape[0], FIRST, COLUMNS, WIDTH)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", *MASK_SCALARS])
def add_layer_norm_forward(
    x,
    residual,
    weight,
    bias,
    linear_bias,
    out,
    mean_out,
    rstd_out,
    dropout_row,
    rows,
    eps,
    seed_low,
    seed_high,
    step,
    site,
    threshold,
    step_pointer,
    scale,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """ROWS rows a program, each in a tile of MAIN columns and, unless REST is 0, one of REST columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    active = row < rows
    mask_row = row
    if DROPOUT:
        mask_row = tl.load(dropout_row + row, mask=active, other=0)
    offset, inside = _place(row, active, 0, MAIN, WIDTH)
    kept = _kept(mask_row, seed_low, seed_high, step, site, threshold, step_pointer, 0, MAIN, DROPOUT)
    shift = _shift(linear_bias, ROWS, 0, MAIN, WIDTH)
    total = _total(x, residual, shift, offset, inside, kept, scale, DROPOUT)
    sum = tl.sum(total, 1)
    if REST > 0:
        offset2, inside2 = _place(row, active, MAIN, REST, WIDTH)
        kept2 = _kept(mask_row, seed_low, seed_high, step, site, threshold, step_pointer, MAIN, REST, DROPOUT)
        shift2 = _shift(linear_bias, ROWS, MAIN, REST, WIDTH)
        total2 = _total(x, residual, shift2, offset2, inside2, kept2, scale, DROPOUT)
        sum += tl.sum(total2, 1)
    mean = sum / WIDTH
    squares = _squares(total, mean, 0, MAIN, WIDTH)
    if REST > 0:
        squares += _squares(total2, mean, MAIN, REST, WIDTH)
    rstd = tl.rsqrt(squares / WIDTH + eps)
    tl.store(mean_out + row, mean, mask=active)
    tl.store(rstd_out + row, rstd, mask=active)
    _write_normed(out, total, mean, rstd, weight, bias, offset, inside, 0, MAIN, WIDTH)
    if REST > 0:
        _write_normed(out, total2, mean, rstd, weight, bias, offset2, inside2, MAIN, REST, WIDTH)


@triton.jit
def _write_gradients(
    dx,
    dresidual,
    weighted,
    normed,
    of_weighted,
    of_product,
    rstd,
    kept,
    scale,
    offset,
    inside,
    DROPOUT: tl.constexpr,
):
    """Write the gradients of residual and of x where asked for; returns that of x, float32 [ROWS, COLUMNS]."""
    gradient = (weighted - of_weighted[:, None] - normed * of_product[:, None]) * rstd[:, None]
    if dresidual is not None:
        tl.store(dresidual + offset, gradient.to(dresidual.dtype.element_ty), mask=inside)
    if DROPOUT:
        gradient = tl.where(kept, gradient * scale, 0.0)
    if dx is not None:
        tl.store(dx + offset, gradient.to(dx.dtype.element_ty), mask=inside)
    return gradient


@triton.jit
def _write_partial(partials, place, sum, FIRST: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    column = FIRST + tl.arange(0, COLUMNS)
    tl.store(partials + place * WIDTH + column, tl.sum(sum, 0), mask=column < WIDTH)


@triton.jit(do_not_specialize=["rows", *MASK_SCALARS])
def add_layer_norm_backward(
    dout,
    x,
    residual,
    weight,
    linear_bias,
    mean_in,
    rstd_in,
    dx,
    dresidual,
    partials,
    bounds,
    dropout_row,
    rows,
    seed_low,
    seed_high,
    step,
    site,
    threshold,
    step_pointer,
    scale,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    DROPOUT: tl.constexpr,
    DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr,
    DLINEAR_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Every so many rows of one group a program, and their part in the sums: partials[asked sum, group, program].

    WIDE: spare registers; else the next row is loaded while one is computed (three stages: two buffers), and the
    parameters are loaded once.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    group = tl.program_id(1)
    low = 0
    high = rows
    if bounds is not None:
        low = tl.load(bounds + group)
        high = tl.load(bounds + group + 1)
    weights = _parameter(weight, 1, 0, MAIN, WIDTH)
    shift = _shift(linear_bias, 1, 0, MAIN, WIDTH)
    dweight = tl.zeros([1, MAIN], tl.float32)
    dbias = tl.zeros([1, MAIN], tl.float32)
    dlinear_bias = tl.zeros([1, MAIN], tl.float32)
    if REST > 0:
        weights2 = _parameter(weight, 1, MAIN, REST, WIDTH)
        shift2 = _shift(linear_bias, 1, MAIN, REST, WIDTH)
        dweight2 = tl.zeros([1, REST], tl.float32)
        dbias2 = tl.zeros([1, REST], tl.float32)
        dlinear_bias2 = tl.zeros([1, REST], tl.float32)
    for begin in tl.range(low + program, high, programs, num_stages=1 if WIDE else 3):
        row = begin + tl.arange(0, 1)
        active = row < high
        mean = tl.load(mean_in + row, mask=active, other=0.0)
        rstd = tl.load(rstd_in + row, mask=active, other=0.0)
        mask_row = row
        if DROPOUT:
            mask_row = tl.load(dropout_row + row, mask=active, other=0)
        offset, inside = _place(row, active, 0, MAIN, WIDTH)
        upstream = tl.load(dout + offset, mask=inside, other=0.0).to(tl.float32)
        kept = _kept(mask_row, seed_low, seed_high, step, site, threshold, step_pointer, 0, MAIN, DROPOUT)
        if WIDE:
            weights = _parameter(weight, 1, 0, MAIN, WIDTH)
            shift = _shift(linear_bias, 1, 0, MAIN, WIDTH)
        total = _total(x, residual, shift, offset, inside, kept, scale, DROPOUT)
        normed = (total - mean[:, None]) * rstd[:, None]
        weighted = upstream * weights
        of_weighted = tl.sum(weighted, 1)
        of_product = tl.sum(weighted * normed, 1)
        if REST > 0:
            offset2, inside2 = _place(row, active, MAIN, REST, WIDTH)
            upstream2 = tl.load(dout + offset2, mask=inside2, other=0.0).to(tl.float32)
            kept2 = _kept(
                mask_row, seed_low, seed_high, step, site, threshold, step_pointer, MAIN, REST, DROPOUT
            )
            if WIDE:
                weights2 = _parameter(weight, 1, MAIN, REST, WIDTH)
                shift2 = _shift(linear_bias, 1, MAIN, REST, WIDTH)
            total2 = _total(x, residual, shift2, offset2, inside2, kept2, scale, DROPOUT)
            normed2 = (total2 - mean[:, None]) * rstd[:, None]
            weighted2 = upstream2 * weights2
            of_weighted += tl.sum(weighted2, 1)
            of_product += tl.sum(weighted2 * normed2, 1)
        of_weighted /= WIDTH
        of_product /= WIDTH
        dbranch = _write_gradients(
            dx,
            dresidual,
            weighted,
            normed,
            of_weighted,
            of_product,
            rstd,
            kept,
            scale,
            offset,
            inside,
            DROPOUT,
        )
        if DWEIGHT:
            dweight += upstream * normed
        if DBIAS:
            dbias += upstream
        if DLINEAR_BIAS:
            dlinear_bias += dbranch
        if REST > 0:
            dbranch2 = _write_gradients(
                dx,
                dresidual,
                weighted2,
                normed2,
                of_weighted,
                of_product,
                rstd,
                kept2,
                scale,
                offset2,
                inside2,
                DROPOUT,
            )
            if DWEIGHT:
                dweight2 += upstream2 * normed2
            if DBIAS:
                dbias2 += upstream2
            if DLINEAR_BIAS:
                dlinear_bias2 += dbranch2
    sums = tl.num_programs(1).to(tl.int64) * programs
    place = group.to(tl.int64) * programs + program
    if DWEIGHT:
        _write_partial(partials, place, dweight, 0, MAIN, WIDTH)
        if REST > 0:
            _write_partial(partials, place, dweight2, MAIN, REST, WIDTH)
        place += sums
    if DBIAS:
        _write_partial(partials, place, dbias, 0, MAIN, WIDTH)
        if REST > 0:
            _write_partial(partials, place, dbias2, MAIN, REST, WIDTH)
        place += sums
    if DLINEAR_BIAS:
        _write_partial(partials, place, dlinear_bias, 0, MAIN, WIDTH)
        if REST > 0:
            _write_partial(partials, place, dlinear_bias2, MAIN, REST, WIDTH)
