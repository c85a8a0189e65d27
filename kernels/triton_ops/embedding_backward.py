"""The gradients of the embeddings' parameters.

One kernel looks the sums up again, takes the gradient through dropout and LayerNorm, and adds up what weight, bias and
the few rows of the token_type table get, a partial sum for each program and group; `table_gradient` then brings the
tokens' gradients to the rows of the word and position tables.

Bytes moved for T tokens of C columns, tables of t bytes an element and a gradient of s bytes: the first kernel reads
the output's gradient and the word rows and writes the sums' gradient in float32, (s + t + 4) T C, and each table reads
that once more, 4 T C. The least would be one pass without the intermediate 8 or 12 T C, if additions to the tables
could be in any order. The partial sums are at most a sixteenth of 4 T C for weight, bias and each type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .embedding_lookup import look_up, tile
from .launch import MASK_SCALARS, kept_scale, launch, power_of_two
from .philox import keep_mask
from .sums import add_partials, processors
from .table_gradient import table_gradient

_ROWS = 1
"""With a second row the sums leave a thread too few registers."""

NOT_NEEDED, WHOLE, GROUPED = 0, 1, 2
"""What is needed of a parameter's gradient: nothing, the sum over all tokens, that of each group."""


@torch.library.custom_op("mtbert::embedding_backward", mutates_args=())
def embedding_backward(
    dout: Tensor,
    ids: Tensor,
    type_ids: Tensor,
    positions: Tensor,
    slots: Tensor | None,
    words: Tensor,
    position_table: Tensor,
    types: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_row: Tensor | None,
    mask: list[int],
    step: Tensor | None,
    bounds: Tensor | None,
    groups: int,
    slot_rows: int,
    bias_dtype: torch.dtype,
    needs: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of word, position, token_type, weight and bias, each as `needs` says; empty where not needed."""
    tokens, columns = dout.shape
    shapes = _shapes(words, position_table, types, slots, slot_rows, groups, needs)
    dtypes = [words.dtype, words.dtype, words.dtype, weight.dtype, bias_dtype]
    if dout.numel() == 0:
        return tuple(  # type: ignore[return-value]
            dout.new_zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
        )
    need_words, need_positions, need_types, need_weight, need_bias = needs
    kinds = types.shape[0]
    split = groups if GROUPED in needs[2:] else 1
    programs = _programs(tokens, split, dout.device)
    row_needs = [need for need in (need_weight, need_bias) if need]
    rows = dout.new_empty(len(row_needs), split, programs, columns, dtype=torch.float32)
    # Summed over the groups too, those of one type must stand together.
    type_shape = (split, kinds) if need_types == GROUPED else (kinds, split)
    by_type = dout.new_empty(*type_shape, programs, columns, dtype=torch.float32) if need_types else None
    group_stride, type_stride = (kinds, 1) if need_types == GROUPED else (1, split)
    dtotal = dout.new_empty(tokens, columns, dtype=torch.float32) if need_words or need_positions else None
    block_rows, block_columns, warps = tile(columns, _ROWS)
    launch(
        embedding_backward_kernel,
        (programs, split),
        dout,
        ids,
        type_ids,
        positions,
        words,
        position_table,
        types,
        weight,
        mean,
        rstd,
        dropout_row,
        bounds if split > 1 else None,
        dtotal,
        rows[0] if need_weight else None,
        rows[-1] if need_bias else None,
        by_type,
        group_stride,
        type_stride,
        tokens,
        columns,
        words.shape[0],
        position_table.shape[0],
        kinds,
        *mask,
        step,
        kept_scale(mask[4]),
        ROWS=block_rows,
        COLUMNS=block_columns,
        TYPES=power_of_two(kinds),
        DROPOUT=dropout_row is not None,
        num_warps=warps,
    )
    found = [dout.new_empty(0, dtype=dtype) for dtype in dtypes]
    tables = ((ids if slots is None else slots, need_words), (positions, need_positions))
    for number, (index, need) in enumerate(tables):
        if need:
            assert dtotal is not None
            own = (bounds, groups) if need == GROUPED else (None, 1)
            size = shapes[number][-2]
            found[number] = table_gradient(dtotal, index, *own, size, dtypes[number]).view(shapes[number])
    if by_type is not None:
        sums = by_type.view(1, -1, programs if need_types == GROUPED else split * programs, columns)
        found[2] = add_partials(sums, dtypes[2:3])[0].view(shapes[2])
    if len(set(row_needs)) == 1:
        sums = rows if row_needs[0] == GROUPED else rows.view(len(rows), 1, -1, columns)
        added = add_partials(sums, [dtype for dtype, need in zip(dtypes[3:], needs[3:], strict=True) if need])
    else:
        added = [
            add_partials(part[None] if need == GROUPED else part.view(1, 1, -1, columns), [dtype])[0]
            for part, need, dtype in zip(rows, row_needs, dtypes[3:], strict=False)
        ]
    for number, gradient in zip((n for n in (3, 4) if needs[n]), added, strict=True):
        found[number] = gradient.view(shapes[number])
    return tuple(found)  # type: ignore[return-value]


def _shapes(
    words: Tensor,
    position_table: Tensor,
    types: Tensor,
    slots: Tensor | None,
    slot_rows: int,
    groups: int,
    needs: list[int],
) -> list[tuple[int, ...]]:
    """The shapes of the five gradients."""
    columns = words.shape[1]
    whole = [(table.shape[0], columns) for table in (words, position_table, types)] + [(columns,)] * 2
    grouped = [(groups, *shape) for shape in whole]
    if slots is not None:
        grouped[0] = (groups, slot_rows, columns)
    return [((0,), w, g)[need] for w, g, need in zip(whole, grouped, needs, strict=True)]


def _programs(tokens: int, groups: int, device: torch.device) -> int:
    """Programs of each group.

    Enough to fill a GPU, and twice that where there are groups, whose sizes may differ much; with at least 16 tokens
    for each as a mean, so that the partial sums stay few.
    """
    most = min(8 * processors(device), 16 * processors(device) // groups)
    return max(1, min(most, tokens // (16 * groups)))


@embedding_backward.register_fake
def _(
    dout: Tensor,
    ids: Tensor,
    type_ids: Tensor,
    positions: Tensor,
    slots: Tensor | None,
    words: Tensor,
    position_table: Tensor,
    types: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_row: Tensor | None,
    mask: list[int],
    step: Tensor | None,
    bounds: Tensor | None,
    groups: int,
    slot_rows: int,
    bias_dtype: torch.dtype,
    needs: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = _shapes(words, position_table, types, slots, slot_rows, groups, needs)
    dtypes = [words.dtype, words.dtype, words.dtype, weight.dtype, bias_dtype]
    return tuple(dout.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))  # type: ignore[return-value]


@triton.jit(do_not_specialize=["group_stride", "type_stride", "tokens", *MASK_SCALARS])
def embedding_backward_kernel(
    dout,
    ids,
    type_ids,
    positions,
    words,
    position_table,
    types,
    weight,
    mean,
    rstd,
    dropout_row,
    bounds,
    dtotal,
    dweight,
    dbias,
    dtypes,
    group_stride,
    type_stride,
    tokens,
    columns,
    word_rows,
    position_rows,
    type_rows,
    seed_low,
    seed_high,
    step,
    site,
    threshold,
    step_pointer,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPES: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Every so many-th tile of ROWS tokens of one group a program.

    dtotal: the gradient of the tokens' sums, float32 [T, C]; dweight, dbias: partial sums, float32
    [groups, programs, C]; dtypes: the same, the place of a type's being group * group_stride + type * type_stride. Each
    may be None: then it isn't computed.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    group = tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    wide = (column < columns)[None, :]
    # As in the forward kernel: of a tile's shape, they come in the threads that need them.
    same = tl.broadcast_to(column[None, :], [ROWS, COLUMNS])
    factor = tl.load(weight + same, mask=same < columns, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([COLUMNS], tl.float32)
    bias_sum = tl.zeros([COLUMNS], tl.float32)
    type_sums = tl.zeros([TYPES, COLUMNS], tl.float32)
    kinds = tl.arange(0, TYPES)
    # Once, not for every tile: within the loop it would cost registers that sm_100 has not.
    if step_pointer is not None:
        step = tl.load(step_pointer).to(tl.int32)
    start = 0
    end = tokens
    if bounds is not None:
        start = tl.load(bounds + group)
        end = tl.load(bounds + group + 1)
    for first in range(start + program * ROWS, end, programs * ROWS):
        token = first + tl.arange(0, ROWS)
        present = token < end
        inside = present[:, None] & wide
        place = token.to(tl.int64)[:, None] * columns + column[None, :]
        gradient = tl.load(dout + place, mask=inside, other=0.0).to(tl.float32)
        if DROPOUT:
            kept = keep_mask(
                tl.load(dropout_row + token, mask=present, other=0),
                0,
                seed_low,
                seed_high,
                step,
                site,
                threshold,
                None,
                COLUMNS // 8,
            )
            gradient = tl.where(kept, gradient * scale, 0.0)
        if dbias is not None:
            bias_sum += tl.sum(gradient, axis=0)
        total = look_up(
            ids,
            type_ids,
            positions,
            words,
            position_table,
            types,
            word_rows,
            position_rows,
            type_rows,
            columns,
            token,
            present,
            column,
        )
        center = tl.load(mean + token, mask=present, other=0.0)[:, None]
        inverse = tl.load(rstd + token, mask=present, other=0.0)[:, None]
        normed = tl.where(inside, (total - center) * inverse, 0.0)
        if dweight is not None:
            weight_sum += tl.sum(gradient * normed, axis=0)
        if (dtotal is not None) or (dtypes is not None):
            gradient *= factor
            along_ones = tl.sum(gradient, axis=1)[:, None] / columns
            along_normed = tl.sum(gradient * normed, axis=1)[:, None] / columns
            value = tl.where(inside, (gradient - along_ones - normed * along_normed) * inverse, 0.0)
            if dtotal is not None:
                tl.store(dtotal + place, value, mask=inside)
            if dtypes is not None:
                kind = tl.load(type_ids + token, mask=present, other=-1)
                for number in tl.static_range(TYPES):
                    sum = tl.sum(tl.where((kind == number)[:, None], value, 0.0), axis=0)
                    type_sums += tl.where((kinds == number)[:, None], sum[None, :], 0.0)
    place = (group.to(tl.int64) * programs + program) * columns + column
    if dweight is not None:
        tl.store(dweight + place, weight_sum, mask=column < columns)
    if dbias is not None:
        tl.store(dbias + place, bias_sum, mask=column < columns)
    if dtypes is not None:
        number = group * group_stride + kinds * type_stride
        rows = (number.to(tl.int64) * programs + program)[:, None] * columns
        tl.store(dtypes + rows + column[None, :], type_sums, mask=(kinds < type_rows)[:, None] & wide)
