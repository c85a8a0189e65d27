"""The sum of a token's three embeddings, as the forward and the backward kernel look it up."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import power_of_two

_WARP = 256
"""Columns of a warp: eight neighbours a thread, which are one draw of the mask and 16 bytes of a half-width dtype."""


def tile(columns: int, rows: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a tile of `rows` whole rows, 8 `rows` elements a thread; of more if they are short.

    Each thread has the same columns of all rows of a tile (from 256 columns on), so that sums over rows stay in it.
    """
    block_columns = max(8, power_of_two(columns))
    warps = min(16, max(1, block_columns // _WARP))
    return max(1, rows * _WARP * warps // block_columns), block_columns, warps


@triton.jit
def look_up(
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
):
    """word + position + token_type of each token, float32 [ROWS, COLUMNS]; zeros where a token or column is not there.

    An index outside its table makes the token's row NaN; nothing outside a table is read.
    """
    word = tl.load(ids + token, mask=present, other=0)
    position = tl.load(positions + token, mask=present, other=0)
    kind = tl.load(type_ids + token, mask=present, other=0)
    inside = present[:, None] & (column < columns)[None, :]
    total = _table_rows(words, word, word_rows, columns, inside, column)
    total += _table_rows(position_table, position, position_rows, columns, inside, column)
    total += _table_rows(types, kind, type_rows, columns, inside, column)
    return tl.where(inside, total, 0.0)


@triton.jit
def _table_rows(table, index, rows, columns, inside, column):
    known = (index >= 0) & (index < rows)
    place = table + index.to(tl.int64)[:, None] * columns + column[None, :]
    return tl.load(place, mask=inside & known[:, None], other=float("nan")).to(tl.float32)
