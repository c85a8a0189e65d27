"""Embeddings in one kernel: three look-ups, their sum, LayerNorm and dropout.

Bytes moved forward for T tokens of C columns, tables of t bytes an element and a result of s bytes: a row of the word
table is read and a row of the result written once a token, (t + s) T C, and 20 T of indices and statistics. That is the
least there is: position and token_type rows are few and stay in the cache. Nothing but two numbers a token is kept for
the backward pass, which looks the sums up again (see `embedding_backward`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..philox import Dropout
from ..segments import Segments
from .embedding_backward import GROUPED, NOT_NEEDED, WHOLE, embedding_backward
from .embedding_lookup import look_up, tile
from .launch import MASK_SCALARS, blocks, kept_scale, launch, mask_arguments
from .philox import keep_mask

_ROWS = 2


def embedding(
    ids: Tensor,
    type_ids: Tensor,
    positions: Tensor,
    parameters: list[Tensor | None],
    companions: list[Tensor | None],
    segments: Segments | None,
    eps: float,
    dtype: torch.dtype,
    dropout_row: Tensor | None,
    dropout: Dropout | None,
) -> Tensor:
    """dropout(LayerNorm(word[ids] + position[positions] + token_type[type_ids])) in dtype, [T, C].

    parameters: word [V, C], position [P, C], token_type [S, C], weight [C], bias [C]; companions: of each, or None.
    """
    bounds, groups, slots = None, 1, None
    if segments is not None and any(c is not None for c in companions):
        bounds, groups = segments.bounds_on(ids.device), segments.count
        slots = segments.slots if companions[0] is not None else None
    mask, step = mask_arguments(dropout)
    return _embedding(
        ids,
        type_ids,
        positions,
        *parameters,
        *companions,
        bounds,
        groups,
        slots,
        eps,
        dtype,
        dropout_row,
        mask,
        step,
    )[0]


@torch.library.custom_op("mtbert::embedding", mutates_args=())
def _embedding(
    ids: Tensor,
    type_ids: Tensor,
    positions: Tensor,
    words: Tensor,
    position_table: Tensor,
    types: Tensor,
    weight: Tensor,
    bias: Tensor,
    words_companion: Tensor | None,
    position_companion: Tensor | None,
    types_companion: Tensor | None,
    weight_companion: Tensor | None,
    bias_companion: Tensor | None,
    bounds: Tensor | None,
    groups: int,
    slots: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    dropout_row: Tensor | None,
    mask: list[int],
    step: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and mean and inverse standard deviation of each token's sum, float32 [T]."""
    out, mean, rstd = _outputs(ids, words, dtype)
    if out.numel() == 0:
        return out, mean, rstd
    tokens, columns = out.shape
    block_rows, block_columns, warps = tile(columns, _ROWS)
    launch(
        embedding_forward_kernel,
        (blocks(tokens, block_rows),),
        ids,
        type_ids,
        positions,
        words,
        position_table,
        types,
        weight,
        bias,
        out,
        mean,
        rstd,
        dropout_row,
        tokens,
        columns,
        words.shape[0],
        position_table.shape[0],
        types.shape[0],
        eps,
        *mask,
        step,
        kept_scale(mask[4]),
        ROWS=block_rows,
        COLUMNS=block_columns,
        DROPOUT=dropout_row is not None,
        num_warps=warps,
    )
    return out, mean, rstd


def _outputs(ids: Tensor, words: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    tokens, columns = ids.shape[0], words.shape[1]
    return (
        words.new_empty(tokens, columns, dtype=dtype),
        words.new_empty(tokens, dtype=torch.float32),
        words.new_empty(tokens, dtype=torch.float32),
    )


@_embedding.register_fake
def _(
    ids: Tensor,
    type_ids: Tensor,
    positions: Tensor,
    words: Tensor,
    position_table: Tensor,
    types: Tensor,
    weight: Tensor,
    bias: Tensor,
    words_companion: Tensor | None,
    position_companion: Tensor | None,
    types_companion: Tensor | None,
    weight_companion: Tensor | None,
    bias_companion: Tensor | None,
    bounds: Tensor | None,
    groups: int,
    slots: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    dropout_row: Tensor | None,
    mask: list[int],
    step: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(ids, words, dtype)


_PARAMETERS, _COMPANIONS = slice(3, 8), slice(8, 13)
"""Their places among the operator's arguments."""
_ARGUMENTS = 21


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ids, type_ids, positions = inputs[:3]
    words, position_table, types, weight, bias = inputs[_PARAMETERS]
    words_companion = inputs[_COMPANIONS][0]
    bounds, groups, slots, _, _, dropout_row, mask, step = inputs[13:]
    _, mean, rstd = output
    indices = (ids, type_ids, positions, slots)
    ctx.save_for_backward(
        *indices, words, position_table, types, weight, mean, rstd, dropout_row, step, bounds
    )
    ctx.bias_dtype, ctx.mask, ctx.groups = bias.dtype, mask, groups
    ctx.slot_rows = 0 if slots is None else words_companion.shape[1]
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * _ARGUMENTS
    if dout is None:
        return tuple(gradients)
    *tensors, step, bounds = ctx.saved_tensors
    pairs = zip(ctx.needs_input_grad[_PARAMETERS], ctx.needs_input_grad[_COMPANIONS], strict=True)
    needs = [GROUPED if companion else WHOLE if parameter else NOT_NEEDED for parameter, companion in pairs]
    found = embedding_backward(
        dout.contiguous(), *tensors, ctx.mask, step, bounds, ctx.groups, ctx.slot_rows, ctx.bias_dtype, needs
    )
    for number, (need, gradient) in enumerate(zip(needs, found, strict=True)):
        if need == WHOLE:
            gradients[_PARAMETERS.start + number] = gradient
        elif need == GROUPED:
            gradients[_COMPANIONS.start + number] = gradient
    return tuple(gradients)


_embedding.register_autograd(_gradients, setup_context=_save)


@triton.jit(do_not_specialize=["tokens", *MASK_SCALARS])
def embedding_forward_kernel(
    ids,
    type_ids,
    positions,
    words,
    position_table,
    types,
    weight,
    bias,
    out,
    mean,
    rstd,
    dropout_row,
    tokens,
    columns,
    word_rows,
    position_rows,
    type_rows,
    eps,
    seed_low,
    seed_high,
    step,
    site,
    threshold,
    step_pointer,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """ROWS tokens a program: the variance from the deviations, which stay in registers."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    present = token < tokens
    inside = present[:, None] & (column < columns)[None, :]
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
    center = tl.sum(total, axis=1) / columns
    deviation = tl.where(inside, total - center[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(deviation * deviation, axis=1) / columns + eps)
    tl.store(mean + token, center, mask=present)
    tl.store(rstd + token, inverse, mask=present)
    # For every row anew, from the cache: of a tile's shape, they come in the threads that need them.
    same = tl.broadcast_to(column[None, :], [ROWS, COLUMNS])
    factor = tl.load(weight + same, mask=same < columns, other=0.0).to(tl.float32)
    shift = tl.load(bias + same, mask=same < columns, other=0.0).to(tl.float32)
    value = deviation * inverse[:, None] * factor + shift
    if DROPOUT:
        kept = keep_mask(
            tl.load(dropout_row + token, mask=present, other=0),
            0,
            seed_low,
            seed_high,
            step,
            site,
            threshold,
            step_pointer,
            COLUMNS // 8,
        )
        value = tl.where(kept, value * scale, 0.0)
    place = token.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
