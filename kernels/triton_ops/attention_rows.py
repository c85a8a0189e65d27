"""Attention over sequences whose scores fit in one tile: whole rows, one program per (sequence, head).

What limits it. Forward must read q, k, v and write the output (4 T H D elements), backward must read these three and
the gradient and write three (7 T H D); these kernels move no more: nothing is saved but the input, and every number
of a sequence is loaded once (the two-pass backward of the widest tile loads keys and values again, from the second
level cache). At 10 to 60 tokens that is L/2 FLOP a byte and less, so bytes set the pace as long as the instructions
fit under them. A multiprocessor of an H200 moves about 18 bytes a clock, so 30 tokens of 64 half-width elements leave
about 850 clocks forward and 1500 backward, with four instructions each: 3400 and 6000. A 32 x 32 tile takes about
1300 and 2600 of a warp's instructions with dropout, a 64 x 64 tile 4000 and 6700. Therefore

- a sequence runs in the narrowest tile that holds it: one launch for each tile up to max_seqlen, and programs of
  sequences that belong to another one leave at once. That costs a wave of empty programs a launch, while one kernel of
  the widest tile would pay its registers (and with them the number of programs in flight) for every short sequence;
- all queries of a sequence are in the tile too: no loop, no accumulators carried, everything in flight at once;
- few warps a program, so that several programs a multiprocessor (17 and 7 of the narrowest tile, 6 and 3 of the
  next) hide each other's waiting;
- a draw of Philox (about 84 instructions for eight elements, a quarter to a third of all with dropout) is made once,
  by the thread that holds the eight elements: see `key_places`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import fill_others, keep_tile, key_places, product
from .launch import MASK_SCALARS, Mask, kept_scale, launch


@dataclass(frozen=True)
class Tile:
    """A square tile of scores and the warps of the programs that work on it."""

    keys: int
    forward_warps: int
    backward_warps: int
    backward_keys: int
    """Keys that backward has in its tile at once."""


def tiles(dtype: torch.dtype, head_dim: int) -> tuple[Tile, ...]:
    """The tiles from narrow to wide; longer sequences, and those of no tile, are the long kernels'.

    Chosen so that nothing spills on sm_80, sm_90 and sm_100. The widest tile's backward works on 32 keys at a time:
    at once its scores and operands take more registers than a thread has. 128 elements a head leave no room for that
    tile at all. In float32 there is none: products without tensor cores hold their operands in registers, which a
    whole row does not fit in.
    """
    if dtype == torch.float32:
        return ()
    if head_dim == 128:
        return (Tile(32, 2, 2, 32), Tile(64, 4, 4, 64))
    return (Tile(32, 1, 2, 32), Tile(64, 4, 4, 64), Tile(128, 8, 8, 32))


def forward(
    qkv: Tensor,
    out: Tensor,
    cu_seqlens: Tensor,
    dropout_row: Tensor | None,
    max_seqlen: int,
    factor: float,
    mask: Mask,
) -> None:
    """Write the rows of `out` that the tiles serve, and of tokens that nobody serves; factor: scale log2(e)."""
    tokens, _, heads, head_dim = qkv.shape
    sequences = cu_seqlens.shape[0] - 1
    for above, tile in _classes(qkv, max_seqlen):
        launch(
            attention_rows_forward_kernel,
            (sequences * heads,),
            qkv,
            out,
            cu_seqlens,
            dropout_row,
            sequences,
            tokens,
            heads,
            above,
            max_seqlen,
            factor,
            kept_scale(mask[0][4]),
            *mask[0],
            mask[1],
            KEYS=tile.keys,
            D=head_dim,
            DROPOUT=mask[0][4] > 0,
            FILL=above == 0,
            num_warps=tile.forward_warps,
            num_stages=1,
        )


def backward(
    grad: Tensor,
    qkv: Tensor,
    dqkv: Tensor,
    cu_seqlens: Tensor,
    dropout_row: Tensor | None,
    max_seqlen: int,
    scale: float,
    factor: float,
    mask: Mask,
) -> None:
    """Write the rows of `dqkv` that the tiles serve, and of tokens that nobody serves."""
    tokens, _, heads, head_dim = qkv.shape
    sequences = cu_seqlens.shape[0] - 1
    for above, tile in _classes(qkv, max_seqlen):
        launch(
            attention_rows_backward_kernel,
            (sequences * heads,),
            grad,
            qkv,
            dqkv,
            cu_seqlens,
            dropout_row,
            sequences,
            tokens,
            heads,
            above,
            max_seqlen,
            scale,
            factor,
            kept_scale(mask[0][4]),
            *mask[0],
            mask[1],
            ROWS=tile.keys,
            KEYS=tile.backward_keys,
            D=head_dim,
            DROPOUT=mask[0][4] > 0,
            FILL=above == 0,
            num_warps=tile.backward_warps,
            num_stages=1,
        )


def _classes(qkv: Tensor, max_seqlen: int) -> list[tuple[int, Tile]]:
    """The tiles that a batch may need, each with the length above which sequences are its own."""
    above = 0
    classes = []
    for tile in tiles(qkv.dtype, qkv.shape[3]):
        if above < max_seqlen:
            classes.append((above, tile))
        above = tile.keys
    return classes


@triton.jit(do_not_specialize=["sequences", "tokens", "heads", "above", "max_seqlen", *MASK_SCALARS])
def attention_rows_forward_kernel(
    qkv,
    out,
    cu_seqlens,
    dropout_row,
    sequences,
    tokens,
    heads,
    above,
    max_seqlen,
    factor,
    kept_scale,
    seed_low,
    seed_high,
    step,
    site,
    threshold,
    step_pointer,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    FILL: tl.constexpr,
):
    """One head of one sequence of more than `above` and at most KEYS tokens."""
    sequence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    width = heads * D
    # Read with the rest, long before they are needed.
    before = tl.load(cu_seqlens)
    after = tl.load(cu_seqlens + sequences)
    first = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - first
    if (length > above) & (length <= tl.minimum(KEYS, max_seqlen)):
        token = first.to(tl.int64)
        qkv += token * (3 * width) + head * D
        target = out + token * width + head * D
        row = tl.arange(0, KEYS)
        key = key_places(KEYS)
        column = tl.arange(0, D)[None, :]
        row_inside = (row < length)[:, None]
        key_inside = (key < length)[:, None]
        mask_row = row
        if DROPOUT:
            mask_row = tl.load(dropout_row + token + row, mask=row < length, other=0)
        q = tl.load(qkv + row[:, None] * (3 * width) + column, mask=row_inside, other=0.0)
        kv = qkv + width + key[:, None] * (3 * width) + column
        k = tl.load(kv, mask=key_inside, other=0.0)
        v = tl.load(kv + width, mask=key_inside, other=0.0)
        scores = product(q, tl.trans(k))
        scores = tl.where((key < length)[None, :], scores, float("-inf"))
        p = tl.exp2((scores - tl.max(scores, 1)[:, None]) * factor)
        total = tl.sum(p, 1)
        if DROPOUT:
            kept = keep_tile(
                mask_row, head * 512, seed_low, seed_high, step, site, threshold, step_pointer, KEYS
            )
            p = tl.where(kept, p, 0.0)
        result = product(p.to(v.dtype), v) * (kept_scale / total)[:, None]
        tl.store(target + row[:, None] * width + column, result.to(out.dtype.element_ty), mask=row_inside)
    if FILL:
        fill_others(
            out, sequence, sequences, first, length, before, after, tokens, max_seqlen, head, width, 1, D
        )


@triton.jit(do_not_specialize=["sequences", "tokens", "heads", "above", "max_seqlen", *MASK_SCALARS])
def attention_rows_backward_kernel(
    grad,
    qkv,
    dqkv,
    cu_seqlens,
    dropout_row,
    sequences,
    tokens,
    heads,
    above,
    max_seqlen,
    scale,
    factor,
    kept_scale,
    seed_low,
    seed_high,
    step,
    site,
    threshold,
    step_pointer,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    FILL: tl.constexpr,
):
    """One head of one sequence of more than `above` and at most ROWS tokens, KEYS keys at a time.

    With P the probabilities before and A after dropout: dV = A^T dO, dA = dO V^T, dP the dropout of dA,
    dS = P (dP - delta) with delta the row sums of P dP, dQ = scale dS K, dK = scale dS^T Q.
    """
    sequence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    width = heads * D
    # Read with the rest, long before they are needed.
    before = tl.load(cu_seqlens)
    after = tl.load(cu_seqlens + sequences)
    first = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - first
    if (length > above) & (length <= tl.minimum(ROWS, max_seqlen)):
        token = first.to(tl.int64)
        qkv += token * (3 * width) + head * D
        target = dqkv + token * (3 * width) + head * D
        grad += token * width + head * D
        row = tl.arange(0, ROWS)
        column = tl.arange(0, D)[None, :]
        row_inside = (row < length)[:, None]
        mask_row = row
        if DROPOUT:
            mask_row = tl.load(dropout_row + token + row, mask=row < length, other=0)
        q_offset = row[:, None] * (3 * width) + column
        grad_offset = row[:, None] * width + column
        q = tl.load(qkv + q_offset, mask=row_inside, other=0.0)
        do = tl.load(grad + grad_offset, mask=row_inside, other=0.0)
        if ROWS == KEYS:
            key = key_places(KEYS)
            key_inside = (key < length)[:, None]
            kv_offset = width + key[:, None] * (3 * width) + column
            k = tl.load(qkv + kv_offset, mask=key_inside, other=0.0)
            v = tl.load(qkv + kv_offset + width, mask=key_inside, other=0.0)
            scores = product(q, tl.trans(k))
            scores = tl.where((key < length)[None, :], scores, float("-inf"))
            p = tl.exp2((scores - tl.max(scores, 1)[:, None]) * factor)
            p *= (1.0 / tl.sum(p, 1))[:, None]
            if DROPOUT:
                kept = keep_tile(
                    mask_row, head * 512, seed_low, seed_high, step, site, threshold, step_pointer, KEYS
                )
                p = tl.where(kept, p, -p)
            dp = _dropped(p, product(do, tl.trans(v)) * kept_scale)
            ds = (tl.abs(p) * (dp - tl.sum(tl.abs(p) * dp, 1)[:, None])).to(q.dtype)
            dv = product(tl.trans(_dropped(p, p).to(do.dtype)), do) * kept_scale
            tl.store(target + kv_offset + width, dv.to(dqkv.dtype.element_ty), mask=key_inside)
            dk = product(tl.trans(ds), q) * scale
            tl.store(target + kv_offset, dk.to(dqkv.dtype.element_ty), mask=key_inside)
            dq = product(ds, k) * scale
            tl.store(target + q_offset, dq.to(dqkv.dtype.element_ty), mask=row_inside)
        else:
            highest = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            delta = tl.zeros([ROWS], tl.float32)
            for start in range(0, length, KEYS):
                key = start + key_places(KEYS)
                key_inside = (key < length)[:, None]
                kv_offset = width + key[:, None] * (3 * width) + column
                k = tl.load(qkv + kv_offset, mask=key_inside, other=0.0)
                v = tl.load(qkv + kv_offset + width, mask=key_inside, other=0.0)
                scores = product(q, tl.trans(k))
                scores = tl.where((key < length)[None, :], scores, float("-inf"))
                higher = tl.maximum(highest, tl.max(scores, 1))
                p = tl.exp2((scores - higher[:, None]) * factor)
                dp = product(do, tl.trans(v))
                if DROPOUT:
                    kept = keep_tile(
                        mask_row,
                        head * 512 + start // 8,
                        seed_low,
                        seed_high,
                        step,
                        site,
                        threshold,
                        step_pointer,
                        KEYS,
                    )
                    dp = tl.where(kept, dp, 0.0)
                shrink = tl.exp2((highest - higher) * factor)
                total = total * shrink + tl.sum(p, 1)
                delta = delta * shrink + tl.sum(p * dp, 1)
                highest = higher
            inverse = 1.0 / total
            delta *= inverse * kept_scale
            dq = tl.zeros([ROWS, D], tl.float32)
            for start in range(0, length, KEYS):
                key = start + key_places(KEYS)
                key_inside = (key < length)[:, None]
                kv_offset = width + key[:, None] * (3 * width) + column
                k = tl.load(qkv + kv_offset, mask=key_inside, other=0.0)
                v = tl.load(qkv + kv_offset + width, mask=key_inside, other=0.0)
                # Loaded again, from the cache: as operands of four products they would fill the registers.
                q = tl.load(qkv + q_offset, mask=row_inside, other=0.0)
                do = tl.load(grad + grad_offset, mask=row_inside, other=0.0)
                scores = product(q, tl.trans(k))
                scores = tl.where((key < length)[None, :], scores, float("-inf"))
                p = tl.exp2((scores - highest[:, None]) * factor) * inverse[:, None]
                if DROPOUT:
                    kept = keep_tile(
                        mask_row,
                        head * 512 + start // 8,
                        seed_low,
                        seed_high,
                        step,
                        site,
                        threshold,
                        step_pointer,
                        KEYS,
                    )
                    p = tl.where(kept, p, -p)
                dv = product(tl.trans(_dropped(p, p).to(do.dtype)), do) * kept_scale
                tl.store(target + kv_offset + width, dv.to(dqkv.dtype.element_ty), mask=key_inside)
                dp = _dropped(p, product(do, tl.trans(v)) * kept_scale)
                ds = (tl.abs(p) * (dp - delta[:, None])).to(q.dtype)
                dk = product(tl.trans(ds), q) * scale
                tl.store(target + kv_offset, dk.to(dqkv.dtype.element_ty), mask=key_inside)
                dq += product(ds, k)
            tl.store(target + q_offset, (dq * scale).to(dqkv.dtype.element_ty), mask=row_inside)
    if FILL:
        fill_others(
            dqkv, sequence, sequences, first, length, before, after, tokens, max_seqlen, head, width, 3, D
        )


@triton.jit
def _dropped(p, value):
    """`value`, or 0 where p is negative: the mask travels as the sign of p and takes no registers.

    A probability of 0 has no sign to tell; whatever `value` is there, it is multiplied by that 0.
    """
    return tl.where(p < 0.0, 0.0, value)
