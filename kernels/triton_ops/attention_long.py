"""Attention over sequences too long for one tile: online softmax, in blocks of queries and keys.

Forward (Dao et al. 2022; Milakov and Gimelshein 2018): a program for each (sequence, head, block of queries) passes
over the keys once, rescaling what it has when a higher score appears, and leaves the logarithm (base 2) of each row's
sum of exponentials. Backward, without atomics and so deterministic, in two launches: for each block of queries dQ,
and on the way delta; then for each block of keys dK and dV. In elements, beside the blocks that are read again from
the second level cache: forward 4 T H D, as little as can be; backward 12 T H D (queries: q, k, v, output, gradient,
dq; keys: q, k, v, gradient, dk, dv; the two float32 numbers a row and head are no more than D / 16 of that), of
which 7 are the minimum. From about 300 tokens on the matrix products and, with dropout, Philox (drawn three times in
all) set the pace, not these bytes: 64 x 64 tiles keep both in registers, with enough programs to hide their waiting.

Why delta = rowsum(dO O) also with dropout: delta is sum_j P_ij dP_ij, and dP_ij = m_ij (dO_i . V_j) with m_ij either 0
or the kept scale; O_i = sum_j m_ij P_ij V_j, so that dO_i . O_i is the same sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import fill_others, keep_tile, key_places, product
from .launch import MASK_SCALARS, Mask, blocks, kept_scale, launch


@dataclass(frozen=True)
class Blocks:
    """Queries and keys of a tile, warps of a program, and how many blocks of keys are on their way at once."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """The tiles of the three kernels."""

    forward: Blocks
    queries: Blocks
    keys: Blocks


def plan(dtype: torch.dtype, head_dim: int) -> Plan:
    """Chosen so that nothing spills on sm_80, sm_90 and sm_100, with and without dropout.

    Operands that do not change in a loop stay in registers on sm_80: with 128 elements a head, and for the kernel
    that keeps keys and values, blocks of keys are narrower. In float32 all operands are in registers and tiles small.
    A third stage where shared memory and registers allow it.
    """
    if dtype == torch.float32:
        if head_dim == 128:
            return Plan(Blocks(16, 32, 8, 1), Blocks(16, 16, 8, 1), Blocks(32, 32, 8, 1))
        if head_dim == 64:
            return Plan(Blocks(32, 32, 4, 1), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1))
        return Plan(Blocks(32, 64, 8, 1), Blocks(32, 64, 8, 1), Blocks(32, 64, 8, 1))
    if head_dim == 128:
        return Plan(Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2), Blocks(64, 32, 8, 2))
    stages = 3 if head_dim <= 32 else 2
    return Plan(Blocks(64, 64, 4, 3), Blocks(64, 64, 4, stages), Blocks(64, 32, 4, stages))


def forward(
    qkv: Tensor,
    out: Tensor,
    logsum: Tensor,
    cu_seqlens: Tensor,
    dropout_row: Tensor | None,
    above: int,
    max_seqlen: int,
    factor: float,
    mask: Mask,
) -> None:
    """Write `out` and `logsum` of the sequences longer than `above`; factor: scale log2(e).

    logsum: float32 [H, T]. With above = 0 tokens that nobody serves are written too.
    """
    tokens, _, heads, head_dim = qkv.shape
    sequences = cu_seqlens.shape[0] - 1
    tile = plan(qkv.dtype, head_dim).forward
    across = blocks(max_seqlen, tile.queries)
    launch(
        attention_long_forward_kernel,
        (sequences * heads * across,),
        qkv,
        out,
        logsum,
        cu_seqlens,
        dropout_row,
        sequences,
        tokens,
        heads,
        across,
        above,
        max_seqlen,
        factor,
        kept_scale(mask[0][4]),
        *mask[0],
        mask[1],
        ROWS=tile.queries,
        KEYS=tile.keys,
        D=head_dim,
        DROPOUT=mask[0][4] > 0,
        FILL=above == 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    logsum: Tensor,
    dqkv: Tensor,
    cu_seqlens: Tensor,
    dropout_row: Tensor | None,
    above: int,
    max_seqlen: int,
    scale: float,
    factor: float,
    mask: Mask,
) -> None:
    """Write `dqkv` of the sequences longer than `above`; with above = 0 tokens that nobody serves too."""
    tokens, _, heads, head_dim = qkv.shape
    sequences = cu_seqlens.shape[0] - 1
    delta = torch.empty_like(logsum)
    by_queries, by_keys = plan(qkv.dtype, head_dim).queries, plan(qkv.dtype, head_dim).keys
    across = blocks(max_seqlen, by_queries.queries)
    launch(
        attention_long_queries_kernel,
        (sequences * heads * across,),
        grad,
        qkv,
        out,
        logsum,
        delta,
        dqkv,
        cu_seqlens,
        dropout_row,
        sequences,
        tokens,
        heads,
        across,
        above,
        max_seqlen,
        scale,
        factor,
        kept_scale(mask[0][4]),
        *mask[0],
        mask[1],
        ROWS=by_queries.queries,
        KEYS=by_queries.keys,
        D=head_dim,
        DROPOUT=mask[0][4] > 0,
        FILL=above == 0,
        num_warps=by_queries.warps,
        num_stages=by_queries.stages,
    )
    across = blocks(max_seqlen, by_keys.keys)
    launch(
        attention_long_keys_kernel,
        (sequences * heads * across,),
        grad,
        qkv,
        logsum,
        delta,
        dqkv,
        cu_seqlens,
        dropout_row,
        tokens,
        heads,
        across,
        above,
        max_seqlen,
        scale,
        factor,
        kept_scale(mask[0][4]),
        *mask[0],
        mask[1],
        ROWS=by_keys.queries,
        KEYS=by_keys.keys,
        D=head_dim,
        DROPOUT=mask[0][4] > 0,
        num_warps=by_keys.warps,
        num_stages=by_keys.stages,
    )


_COUNTS = ["sequences", "tokens", "heads", "across", "above", "max_seqlen"]


@triton.jit(do_not_specialize=[*_COUNTS, *MASK_SCALARS])
def attention_long_forward_kernel(
    qkv,
    out,
    logsum,
    cu_seqlens,
    dropout_row,
    sequences,
    tokens,
    heads,
    across,
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
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    FILL: tl.constexpr,
):
    """One head of a block of ROWS queries of a sequence of more than `above` tokens; across: blocks a sequence."""
    block = tl.program_id(0) % across
    sequence = tl.program_id(0) // across // heads
    head = tl.program_id(0) // across % heads
    width = heads * D
    # Read with the rest, long before they are needed.
    before = tl.load(cu_seqlens)
    after = tl.load(cu_seqlens + sequences)
    first = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - first
    if (length > above) & (length <= max_seqlen) & (block * ROWS < length):
        token = first.to(tl.int64)
        qkv += token * (3 * width) + head * D
        target = out + token * width + head * D
        logsum += head.to(tl.int64) * tokens + token
        column = tl.arange(0, D)[None, :]
        row = block * ROWS + tl.arange(0, ROWS)
        row_inside = (row < length)[:, None]
        mask_row = row
        if DROPOUT:
            mask_row = tl.load(dropout_row + token + row, mask=row < length, other=0)
        q = tl.load(qkv + row[:, None] * (3 * width) + column, mask=row_inside, other=0.0)
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        result = tl.zeros([ROWS, D], tl.float32)
        for start in range(0, length, KEYS):
            key = start + key_places(KEYS)
            key_inside = (key < length)[:, None]
            kv = qkv + width + key[:, None] * (3 * width) + column
            k = tl.load(kv, mask=key_inside, other=0.0)
            v = tl.load(kv + width, mask=key_inside, other=0.0)
            scores = product(q, tl.trans(k))
            scores = tl.where((key < length)[None, :], scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            p = tl.exp2((scores - higher[:, None]) * factor)
            shrink = tl.exp2((highest - higher) * factor)
            total = total * shrink + tl.sum(p, 1)
            if DROPOUT:
                group = head * 512 + start // 8
                kept = keep_tile(
                    mask_row, group, seed_low, seed_high, step, site, threshold, step_pointer, KEYS
                )
                p = tl.where(kept, p, 0.0)
            result = result * shrink[:, None] + product(p.to(v.dtype), v)
            highest = higher
        result *= (kept_scale / total)[:, None]
        tl.store(target + row[:, None] * width + column, result.to(out.dtype.element_ty), mask=row_inside)
        tl.store(logsum + row, highest * factor + tl.log2(total), mask=row < length)
    if FILL:  # noqa: SIM102 - FILL is known when compiling
        if block == 0:
            fill_others(
                out, sequence, sequences, first, length, before, after, tokens, max_seqlen, head, width, 1, D
            )


@triton.jit(do_not_specialize=[*_COUNTS, *MASK_SCALARS])
def attention_long_queries_kernel(
    grad,
    qkv,
    out,
    logsum,
    delta,
    dqkv,
    cu_seqlens,
    dropout_row,
    sequences,
    tokens,
    heads,
    across,
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
    """dQ, and delta, of one head of a block of ROWS queries."""
    block = tl.program_id(0) % across
    sequence = tl.program_id(0) // across // heads
    head = tl.program_id(0) // across % heads
    width = heads * D
    # Read with the rest, long before they are needed.
    before = tl.load(cu_seqlens)
    after = tl.load(cu_seqlens + sequences)
    first = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - first
    if (length > above) & (length <= max_seqlen) & (block * ROWS < length):
        token = first.to(tl.int64)
        qkv += token * (3 * width) + head * D
        target = dqkv + token * (3 * width) + head * D
        out += token * width + head * D
        grad += token * width + head * D
        logsum += head.to(tl.int64) * tokens + token
        delta += head.to(tl.int64) * tokens + token
        column = tl.arange(0, D)[None, :]
        row = block * ROWS + tl.arange(0, ROWS)
        row_inside = (row < length)[:, None]
        mask_row = row
        if DROPOUT:
            mask_row = tl.load(dropout_row + token + row, mask=row < length, other=0)
        row_offset = row[:, None] * width + column
        q = tl.load(qkv + row[:, None] * (3 * width) + column, mask=row_inside, other=0.0)
        do = tl.load(grad + row_offset, mask=row_inside, other=0.0)
        o = tl.load(out + row_offset, mask=row_inside, other=0.0)
        level = tl.load(logsum + row, mask=row < length, other=0.0)
        row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(delta + row, row_delta, mask=row < length)
        dq = tl.zeros([ROWS, D], tl.float32)
        for start in range(0, length, KEYS):
            key = start + key_places(KEYS)
            key_inside = (key < length)[:, None]
            kv = qkv + width + key[:, None] * (3 * width) + column
            k = tl.load(kv, mask=key_inside, other=0.0)
            v = tl.load(kv + width, mask=key_inside, other=0.0)
            scores = product(q, tl.trans(k))
            p = tl.where((key < length)[None, :], tl.exp2(scores * factor - level[:, None]), 0.0)
            dp = product(do, tl.trans(v)) * kept_scale
            if DROPOUT:
                group = head * 512 + start // 8
                kept = keep_tile(
                    mask_row, group, seed_low, seed_high, step, site, threshold, step_pointer, KEYS
                )
                dp = tl.where(kept, dp, 0.0)
            ds = (p * (dp - row_delta[:, None])).to(k.dtype)
            dq += product(ds, k)
        dq *= scale
        tl.store(target + row[:, None] * (3 * width) + column, dq.to(dqkv.dtype.element_ty), mask=row_inside)
    if FILL:  # noqa: SIM102 - FILL is known when compiling
        if block == 0:
            fill_others(
                dqkv, sequence, sequences, first, length, before, after, tokens, max_seqlen, head, width, 3, D
            )


@triton.jit(do_not_specialize=[*_COUNTS[1:], *MASK_SCALARS])
def attention_long_keys_kernel(
    grad,
    qkv,
    logsum,
    delta,
    dqkv,
    cu_seqlens,
    dropout_row,
    tokens,
    heads,
    across,
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
):
    """dK and dV of one head of a block of KEYS keys."""
    block = tl.program_id(0) % across
    sequence = tl.program_id(0) // across // heads
    head = tl.program_id(0) // across % heads
    width = heads * D
    first = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - first
    if (length > above) & (length <= max_seqlen) & (block * KEYS < length):
        token = first.to(tl.int64)
        qkv += token * (3 * width) + head * D
        dqkv += token * (3 * width) + head * D
        grad += token * width + head * D
        logsum += head.to(tl.int64) * tokens + token
        delta += head.to(tl.int64) * tokens + token
        column = tl.arange(0, D)[None, :]
        key = block * KEYS + key_places(KEYS)
        key_inside = (key < length)[:, None]
        kv_offset = width + key[:, None] * (3 * width) + column
        k = tl.load(qkv + kv_offset, mask=key_inside, other=0.0)
        v = tl.load(qkv + kv_offset + width, mask=key_inside, other=0.0)
        dk = tl.zeros([KEYS, D], tl.float32)
        dv = tl.zeros([KEYS, D], tl.float32)
        for start in range(0, length, ROWS):
            row = start + tl.arange(0, ROWS)
            row_inside = (row < length)[:, None]
            q = tl.load(qkv + row[:, None] * (3 * width) + column, mask=row_inside, other=0.0)
            do = tl.load(grad + row[:, None] * width + column, mask=row_inside, other=0.0)
            level = tl.load(logsum + row, mask=row < length, other=0.0)
            row_delta = tl.load(delta + row, mask=row < length, other=0.0)
            # Beyond the last row q and dO are 0, which makes both sums' terms 0 whatever p is (1 there, or a NaN of
            # this very block of keys); beyond the last key nothing is stored.
            p = tl.exp2(product(q, tl.trans(k)) * factor - level[:, None])
            dp = product(do, tl.trans(v)) * kept_scale
            dropped = p
            if DROPOUT:
                mask_row = tl.load(dropout_row + token + row, mask=row < length, other=0)
                group = head * 512 + block * (KEYS // 8)
                kept = keep_tile(
                    mask_row, group, seed_low, seed_high, step, site, threshold, step_pointer, KEYS
                )
                dropped = tl.where(kept, p, 0.0)
                dp = tl.where(kept, dp, 0.0)
            dv += product(tl.trans(dropped.to(do.dtype)), do)
            ds = (p * (dp - row_delta[:, None])).to(q.dtype)
            dk += product(tl.trans(ds), q)
        dk *= scale
        dv *= kept_scale
        tl.store(dqkv + kv_offset, dk.to(dqkv.dtype.element_ty), mask=key_inside)
        tl.store(dqkv + kv_offset + width, dv.to(dqkv.dtype.element_ty), mask=key_inside)
