"""The stateless dropout mask inside Triton kernels: the same bits as `mtbert.kernels.philox`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def draw(seed_low, seed_high, c0, c1, c2, c3):
    """Four uint32 tensors: Philox4x32-10 of four int32 tensors of one shape, under a key of two int32 numbers."""
    low = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    high = seed_high.to(tl.uint32, bitcast=True).to(tl.uint64)
    # Every word must be 32 bits wide: a 64-bit first word would silently choose Philox4x64.
    return tl.philox((high << 32) | low, c0, c1, c2, c3)


@triton.jit
def keep_mask(
    dropout_row,
    first_group,
    seed_low,
    seed_high,
    step,
    site,
    threshold,
    step_pointer,
    GROUPS: tl.constexpr,
):
    """Which elements of a tile are kept: one draw for eight neighbouring columns.

    dropout_row: int32 [R], the mask's row of each row of the tile; first_group: the tile's first column // 8;
    step_pointer: None, or where the step lies on the device (it then stands for `step`). Returns bool [R, 8 GROUPS].
    """
    if step_pointer is not None:
        step = tl.load(step_pointer).to(tl.int32)
    rows: tl.constexpr = dropout_row.shape[0]
    zero = tl.zeros([rows, GROUPS], tl.int32)
    group = first_group + tl.arange(0, GROUPS)
    w0, w1, w2, w3 = draw(
        seed_low, seed_high, zero + group[None, :], zero + dropout_row[:, None], zero + site, zero + step
    )
    # join appends an axis of two. The lanes' order is: word // 2, then word % 2, then the half of the word.
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    lanes = tl.reshape(tl.join(low, high), [rows, 8 * GROUPS])
    return lanes >= threshold.to(tl.uint32)
