"""What the attention kernels share: the order of the keys in a tile, its mask, and the tokens nobody attends from."""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import draw

LOG2_E = 1.4426950408889634
"""The kernels take powers of two, which is what the hardware has."""

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(a, b):
    """The matrix product, accumulated in float32; float32 factors are not rounded.

    Triton's interpreter multiplies the bits of bfloat16 numbers as if they were integers: there it gets float32.
    """
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def key_places(KEYS: tl.constexpr):
    """The key that each column of a score tile stands for, int32 [KEYS], counted from the tile's first key.

    Attention does not care in which order the keys come, the mask does. Eight neighbouring keys share a draw, but a
    thread of a tensor-core product holds columns 2 t and 2 t + 1 (and the same two plus 8, plus 16, ...). So columns
    count (word of the draw, group of eight keys, half of the word), slowest first: with that, a thread holds whole
    draws, and the mask comes about in the layout of the scores, without a draw made twice or sent to another thread.
    """
    column = tl.arange(0, KEYS)
    return column // 2 % (KEYS // 8) * 8 + column // (KEYS // 4) * 2 + column % 2


@triton.jit
def keep_tile(
    dropout_row,
    first_group,
    seed_low,
    seed_high,
    step,
    site,
    threshold,
    step_pointer,
    KEYS: tl.constexpr,
):
    """Which probabilities of a tile are kept, bool [R, KEYS], its columns in the order of `key_places`.

    dropout_row: int32 [R], the mask's row of each query; first_group: the mask's column of the tile's first key,
    divided by 8; step_pointer: None, or where the step lies on the device (it then stands for `step`).
    """
    if step_pointer is not None:
        step = tl.load(step_pointer).to(tl.int32)
    rows: tl.constexpr = dropout_row.shape[0]
    groups: tl.constexpr = KEYS // 8
    zero = tl.zeros([rows, groups], tl.int32)
    group = first_group + tl.arange(0, groups)
    w0, w1, w2, w3 = draw(
        seed_low, seed_high, zero + group[None, :], zero + dropout_row[:, None], zero + site, zero + step
    )
    # join appends an axis of two: [rows, groups, word // 2, word % 2, half].
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    lanes = tl.permute(tl.join(words & 0xFFFF, words >> 16), (0, 2, 3, 1, 4))
    return tl.reshape(lanes, [rows, KEYS]) >= threshold.to(tl.uint32)


@triton.jit
def fill_others(
    out,
    sequence,
    sequences,
    first,
    length,
    before,
    after,
    tokens,
    max_seqlen,
    head,
    width,
    PARTS: tl.constexpr,
    D: tl.constexpr,
):
    """Part of one head of the tokens whose results no program computes; out: [T, PARTS, H, D], width = H D.

    Zeros for the tokens of no sequence, those in front of `before` and from `after` on, which the programs of all
    sequences share out among them. NaN for every token of a sequence longer than max_seqlen, so that a broken promise
    is seen: the host does not know the lengths.
    """
    ROWS: tl.constexpr = 32
    out += head * D
    column = tl.arange(0, D)[None, :]
    others = before + tokens - after
    for start in range(sequence * ROWS, others, sequences * ROWS):
        row = start + tl.arange(0, ROWS)
        token = tl.where(row < before, row, row - before + after).to(tl.int64)[:, None]
        for part in tl.static_range(PARTS):
            zero = tl.zeros([ROWS, D], out.dtype.element_ty)
            tl.store(out + (token * PARTS + part) * width + column, zero, mask=(row < others)[:, None])
    if length > max_seqlen:
        for start in range(0, length, ROWS):
            row = start + tl.arange(0, ROWS)
            token = (first + row).to(tl.int64)[:, None]
            for part in tl.static_range(PARTS):
                nan = tl.full([ROWS, D], float("nan"), out.dtype.element_ty)
                tl.store(out + (token * PARTS + part) * width + column, nan, mask=(row < length)[:, None])
