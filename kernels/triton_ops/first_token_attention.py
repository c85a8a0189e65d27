"""Attention of one query a row: a program for each (sequence, head).

Forward must read keys and values and write a vector a row (2 T H D elements), backward must read and write both
(4 T H D): the kernels move no more beside single rows, and save nothing but the input. A query meets every key once,
2 D multiplications for the 4 D bytes of a key and its value: bytes set the pace and tensor cores are of no use, sums
over D are taken in plain float32. The softmax is online (Milakov and Gimelshein 2018), so that no tile need hold a
sequence: 32 keys at a time are most sentences whole. Backward passes over keys and values twice, for the softmax's sums
and for the gradients; the second time they come from a cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..philox import Dropout
from .attention_tile import LOG2_E, fill_others, keep_tile, key_places
from .launch import MASK_SCALARS, kept_scale, launch, mask_arguments

_KEYS = 32
"""Keys in a tile."""


def _warps(query: Tensor) -> int:
    """Each holds at most 2 KiB of keys and as much of values: nothing spills on sm_80, sm_90 and sm_100."""
    return max(1, query.shape[2] * query.element_size() // 64)


def first_token_attention(
    query: Tensor,
    key_value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    dropout_row: Tensor | None,
    dropout: Dropout | None,
) -> Tensor:
    """[N, H, D] for query [N, H, D] and key_value [T, 2, H, D], as the public function has it."""
    mask = mask_arguments(dropout)
    return _forward(query, key_value, cu_seqlens, dropout_row, max_seqlen, scale, *mask)


@torch.library.custom_op("mtbert::first_token_attention", mutates_args=())
def _forward(
    query: Tensor,
    key_value: Tensor,
    cu_seqlens: Tensor,
    dropout_row: Tensor | None,
    max_seqlen: int,
    scale: float,
    mask: list[int],
    step: Tensor | None,
) -> Tensor:
    out = torch.empty_like(query)
    sequences, heads, head_dim = query.shape
    if out.numel() == 0:
        return out
    launch(
        first_token_attention_forward_kernel,
        (sequences * heads,),
        query,
        key_value,
        out,
        cu_seqlens,
        dropout_row,
        heads,
        max_seqlen,
        scale * LOG2_E,
        kept_scale(mask[4]),
        *mask,
        step,
        KEYS=_KEYS,
        D=head_dim,
        DROPOUT=mask[4] > 0,
        num_warps=_warps(query),
        num_stages=1,
    )
    return out


@_forward.register_fake
def _(
    query: Tensor,
    key_value: Tensor,
    cu_seqlens: Tensor,
    dropout_row: Tensor | None,
    max_seqlen: int,
    scale: float,
    mask: list[int],
    step: Tensor | None,
) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("mtbert::first_token_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key_value: Tensor,
    cu_seqlens: Tensor,
    dropout_row: Tensor | None,
    max_seqlen: int,
    scale: float,
    mask: list[int],
    step: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of query and key_value."""
    dquery, dkey_value = torch.empty_like(query), torch.empty_like(key_value)
    sequences, heads, head_dim = query.shape
    if dquery.numel() == 0:
        return dquery, dkey_value.zero_()
    launch(
        first_token_attention_backward_kernel,
        (sequences * heads,),
        grad,
        query,
        key_value,
        dquery,
        dkey_value,
        cu_seqlens,
        dropout_row,
        sequences,
        key_value.shape[0],
        heads,
        max_seqlen,
        scale,
        scale * LOG2_E,
        kept_scale(mask[4]),
        *mask,
        step,
        KEYS=_KEYS,
        D=head_dim,
        DROPOUT=mask[4] > 0,
        num_warps=_warps(query),
        num_stages=1,
    )
    return dquery, dkey_value


@_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key_value: Tensor,
    cu_seqlens: Tensor,
    dropout_row: Tensor | None,
    max_seqlen: int,
    scale: float,
    mask: list[int],
    step: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key_value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key_value, cu_seqlens, dropout_row, max_seqlen, scale, mask, step = inputs
    ctx.save_for_backward(query, key_value, cu_seqlens, dropout_row, step)
    ctx.constants = (max_seqlen, scale, mask)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key_value, cu_seqlens, dropout_row, step = ctx.saved_tensors
    max_seqlen, scale, mask = ctx.constants
    dquery, dkey_value = _backward(
        grad.contiguous(), query, key_value, cu_seqlens, dropout_row, max_seqlen, scale, mask, step
    )
    return dquery, dkey_value, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@triton.jit(do_not_specialize=["heads", "max_seqlen", *MASK_SCALARS])
def first_token_attention_forward_kernel(
    query,
    key_value,
    out,
    cu_seqlens,
    dropout_row,
    heads,
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
):
    """One head of one sequence. An empty sequence gives 0, one longer than max_seqlen NaN; factor: scale log2(e)."""
    program = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    width = heads * D
    first = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - first
    column = tl.arange(0, D)
    q = tl.load(query + program * D + column).to(tl.float32)[None, :]
    key_value += first.to(tl.int64) * (2 * width) + head * D
    mask_row = tl.zeros([1], tl.int32)
    if DROPOUT:
        mask_row += tl.load(dropout_row + sequence)
    highest = float("-inf")
    total = 0.0
    result = tl.zeros([D], tl.float32)
    if length <= max_seqlen:
        for start in range(0, length, KEYS):
            key = start + key_places(KEYS)
            inside = (key < length)[:, None]
            kv = key_value + key[:, None] * (2 * width) + column[None, :]
            k = tl.load(kv, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(kv + width, mask=inside, other=0.0).to(tl.float32)
            scores = tl.where(key < length, tl.sum(q * k, 1), float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 0))
            p = tl.exp2((scores - higher) * factor)
            shrink = tl.exp2((highest - higher) * factor)
            total = total * shrink + tl.sum(p, 0)
            if DROPOUT:
                group = head * 512 + start // 8
                kept = keep_tile(
                    mask_row, group, seed_low, seed_high, step, site, threshold, step_pointer, KEYS
                )
                p = tl.where(tl.reshape(kept, [KEYS]), p, 0.0)
            result = result * shrink + tl.sum(p[:, None] * v, 0)
            highest = higher
        if length > 0:
            result *= kept_scale / total
    else:
        result += float("nan")
    tl.store(out + program * D + column, result.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["sequences", "tokens", "heads", "max_seqlen", *MASK_SCALARS])
def first_token_attention_backward_kernel(
    grad,
    query,
    key_value,
    dquery,
    dkey_value,
    cu_seqlens,
    dropout_row,
    sequences,
    tokens,
    heads,
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
    KEYS: tl.constexpr,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """One head of one sequence, and its share of the tokens of no sequence.

    With p the probabilities before and a after dropout: dV = a dO, da = V dO, dp the dropout of da,
    ds = p (dp - delta) with delta the sum of p dp, dQ = scale sum(ds K), dK = scale ds Q.
    """
    program = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    width = heads * D
    before = tl.load(cu_seqlens)
    after = tl.load(cu_seqlens + sequences)
    first = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - first
    column = tl.arange(0, D)
    q = tl.load(query + program * D + column).to(tl.float32)
    do = tl.load(grad + program * D + column).to(tl.float32)
    offset = first.to(tl.int64) * (2 * width) + head * D
    mask_row = tl.zeros([1], tl.int32)
    if DROPOUT:
        mask_row += tl.load(dropout_row + sequence)
    dq = tl.zeros([D], tl.float32)
    if length <= max_seqlen:
        highest = float("-inf")
        total = 0.0
        delta = 0.0
        for start in range(0, length, KEYS):
            key = start + key_places(KEYS)
            inside = (key < length)[:, None]
            kv = key_value + offset + key[:, None] * (2 * width) + column[None, :]
            k = tl.load(kv, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(kv + width, mask=inside, other=0.0).to(tl.float32)
            scores = tl.where(key < length, tl.sum(q[None, :] * k, 1), float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 0))
            p = tl.exp2((scores - higher) * factor)
            dp = tl.sum(do[None, :] * v, 1)
            if DROPOUT:
                group = head * 512 + start // 8
                kept = keep_tile(
                    mask_row, group, seed_low, seed_high, step, site, threshold, step_pointer, KEYS
                )
                dp = tl.where(tl.reshape(kept, [KEYS]), dp, 0.0)
            shrink = tl.exp2((highest - higher) * factor)
            total = total * shrink + tl.sum(p, 0)
            delta = delta * shrink + tl.sum(p * dp, 0)
            highest = higher
        for start in range(0, length, KEYS):
            key = start + key_places(KEYS)
            inside = (key < length)[:, None]
            kv = offset + key[:, None] * (2 * width) + column[None, :]
            k = tl.load(key_value + kv, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(key_value + kv + width, mask=inside, other=0.0).to(tl.float32)
            scores = tl.where(key < length, tl.sum(q[None, :] * k, 1), float("-inf"))
            p = tl.exp2((scores - highest) * factor) / total
            dp = tl.sum(do[None, :] * v, 1)
            dropped = p
            if DROPOUT:
                group = head * 512 + start // 8
                kept = keep_tile(
                    mask_row, group, seed_low, seed_high, step, site, threshold, step_pointer, KEYS
                )
                kept = tl.reshape(kept, [KEYS])
                dp = tl.where(kept, dp, 0.0)
                dropped = tl.where(kept, p, 0.0)
            ds = p * (dp - delta / total) * (kept_scale * scale)
            dk = ds[:, None] * q[None, :]
            dv = (dropped * kept_scale)[:, None] * do[None, :]
            tl.store(dkey_value + kv, dk.to(dkey_value.dtype.element_ty), mask=inside)
            tl.store(dkey_value + kv + width, dv.to(dkey_value.dtype.element_ty), mask=inside)
            dq += tl.sum(ds[:, None] * k, 0)
    else:
        dq += float("nan")
    tl.store(dquery + program * D + column, dq.to(dquery.dtype.element_ty))
    fill_others(
        dkey_value, sequence, sequences, first, length, before, after, tokens, max_seqlen, head, width, 2, D
    )
