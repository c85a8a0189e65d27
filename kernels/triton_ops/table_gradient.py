"""The gradient of a look-up in a table: rows summed by their index, without atomics, in an order that never changes.

A stable sort brings the tokens of each row of the table together: runs of equal keys. Programs take _ROWS sorted tokens
each, whatever the runs: a run within them is summed and written, a part of a longer one goes to an intermediate buffer,
and a second kernel adds these parts in order. So the thousands of tokens of one frequent word are spread over the whole
GPU. Nothing depends on how many runs there are, which only the device knows.

Bytes moved for T tokens of C columns: the tokens' gradients are read once, 4 T C; the table's gradient is zeroed and
written; at most 2 / _ROWS of 4 T C go through the buffer, in both directions; sorting moves some 100 T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import blocks, launch, power_of_two

_ROWS = 32
"""Sorted tokens of a program. One warp holds them in registers, so that a run is summed without shared memory."""
_COLUMNS = 128
"""Columns of a program: 16 bytes of float32 a thread."""
_PARTS = 16
"""Parts of one run that are added at once."""
_KEYS = 1024


def table_gradient(
    dtotal: Tensor, index: Tensor, bounds: Tensor | None, groups: int, rows: int, dtype: torch.dtype
) -> Tensor:
    """The gradient [groups, rows, C], in dtype, of a table [rows, C] which was read at `index`.

    dtotal: float32 [T, C], the gradient of what was read; index: int32 [T], outside of the table for a token that is
    ignored; bounds: int32 [groups + 1], or None for one group.
    """
    tokens, columns = dtotal.shape
    out = dtotal.new_zeros(groups, rows, columns, dtype=dtype)
    if dtotal.numel() == 0 or out.numel() == 0:
        return out
    # The key of what is in no row of the table is one more than the last row's.
    wide = groups * rows >= 1 << 31
    unsorted = torch.empty(tokens, dtype=torch.int64 if wide else torch.int32, device=index.device)
    launch(
        table_keys_kernel,
        (blocks(tokens, _KEYS),),
        index,
        bounds,
        unsorted,
        tokens,
        groups,
        rows,
        BLOCK=_KEYS,
    )
    keys, order = torch.sort(unsorted, stable=True)
    chunks = blocks(tokens, _ROWS)
    parts = dtotal.new_empty(2, chunks, columns)
    block_columns = min(_COLUMNS, power_of_two(columns))
    grid = (chunks, blocks(columns, block_columns))
    sizes = (tokens, columns, chunks, groups, rows)
    shape = {"ROWS": _ROWS, "COLUMNS": block_columns, "num_warps": 1}
    launch(run_sums_kernel, grid, dtotal, keys, order, out, parts, *sizes, **shape)
    launch(join_parts_kernel, grid, keys, out, parts, *sizes, PARTS=_PARTS, **shape)
    return out


@triton.jit(do_not_specialize=["tokens", "groups", "rows"])
def table_keys_kernel(index, bounds, keys, tokens, groups, rows, BLOCK: tl.constexpr):
    """group * rows + index of each token, groups * rows where the index is outside of the table."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(index + token, mask=token < tokens, other=0)
    group = tl.zeros([BLOCK], keys.dtype.element_ty)
    if bounds is not None:
        for number in range(1, groups):
            group += (token >= tl.load(bounds + number)).to(keys.dtype.element_ty)
    known = (value >= 0) & (value < rows)
    key = tl.where(known, group, groups) * rows + tl.where(known, value, 0)
    tl.store(keys + token, key.to(keys.dtype.element_ty), mask=token < tokens)


@triton.jit(do_not_specialize=["tokens", "chunks", "groups", "rows"])
def run_sums_kernel(
    dtotal,
    keys,
    order,
    out,
    parts,
    tokens,
    columns,
    chunks,
    groups,
    rows,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The runs, and parts of runs, within ROWS sorted tokens.

    parts: float32 [2, chunks, C]: [0] of a run that began in an earlier chunk, [1] of one that begins here and goes on.
    """
    chunk = tl.program_id(0)
    first = chunk * ROWS
    place = first + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.zeros([], keys.dtype.element_ty) + groups
    end = end * rows
    key = tl.load(keys + place, mask=place < tokens, other=0)
    key = tl.where(place < tokens, key, end)
    token = tl.load(order + place, mask=place < tokens, other=0)
    inside = (key < end)[:, None] & (column < columns)[None, :]
    value = tl.load(dtotal + token[:, None] * columns + column[None, :], mask=inside, other=0.0)
    before = tl.load(keys + first - 1, mask=chunk > 0, other=-1)
    behind = tl.load(keys + first + ROWS, mask=first + ROWS < tokens, other=-1)
    current = tl.min(key, axis=0)
    while current < end:
        sum = tl.sum(tl.where((key == current)[:, None], value, 0.0), axis=0)
        if (current != before) & (current != behind):
            row = out + current.to(tl.int64) * columns + column
            tl.store(row, sum.to(out.dtype.element_ty), mask=column < columns)
        else:
            which = tl.where(current == before, 0, chunks)
            part = parts + (which + chunk).to(tl.int64) * columns + column
            tl.store(part, sum, mask=column < columns)
        current = tl.min(tl.where(key > current, key, end), axis=0)


@triton.jit(do_not_specialize=["tokens", "chunks", "groups", "rows"])
def join_parts_kernel(
    keys,
    out,
    parts,
    tokens,
    columns,
    chunks,
    groups,
    rows,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The run that begins in a chunk and goes on in the next: the sum of its parts, PARTS at a time."""
    chunk = tl.program_id(0)
    first = chunk * ROWS
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.zeros([], keys.dtype.element_ty) + groups
    end = end * rows
    before = tl.load(keys + first - 1, mask=chunk > 0, other=-1)
    behind = tl.load(keys + first + ROWS, mask=first + ROWS < tokens, other=-1)
    key = tl.load(keys + first + ROWS - 1, mask=first + ROWS < tokens, other=-2)
    if (key == behind) & (key != before) & (key < end):
        start = parts + (chunks + chunk).to(tl.int64) * columns
        sum = tl.load(start + column, mask=column < columns, other=0.0)
        number = chunk + 1 + tl.arange(0, PARTS)
        more = 1
        while more > 0:
            begin = tl.load(keys + number * ROWS, mask=number < chunks, other=-1)
            inside = (begin == key)[:, None] & (column < columns)[None, :]
            place = parts + number.to(tl.int64)[:, None] * columns + column[None, :]
            sum += tl.sum(tl.load(place, mask=inside, other=0.0), axis=0)
            more = tl.min((begin == key).to(tl.int32), axis=0)
            number += PARTS
        tl.store(
            out + key.to(tl.int64) * columns + column, sum.to(out.dtype.element_ty), mask=column < columns
        )
