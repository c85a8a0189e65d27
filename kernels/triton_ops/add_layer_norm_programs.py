"""The Triton programs of `add_layer_norm`, forward and backward: whole rows in registers, in one or two tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import MASK_SCALARS
from .philox import keep_mask


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
