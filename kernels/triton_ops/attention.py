"""Attention over packed rows: the operators, and which kernels serve which sequences.

Sequences that fit in a tile (up to 128 tokens) are served by `attention_rows`, longer ones by `attention_long`, both
within one call: kernels look at the lengths on the device, the host knows max_seqlen alone and launches what a batch
may need. So a sequence is computed alike whatever else is in its batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..philox import Dropout
from . import attention_long, attention_rows
from .attention_tile import LOG2_E
from .launch import mask_arguments


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    dropout_row: Tensor | None,
    dropout: Dropout | None,
) -> Tensor:
    """[T, H, D] for qkv [T, 3, H, D], as the public function has it."""
    return _forward(qkv, cu_seqlens, dropout_row, max_seqlen, scale, *mask_arguments(dropout))[0]


def _whole_rows(qkv: Tensor) -> int:
    """The longest sequence that attention_rows serves."""
    return max((tile.keys for tile in attention_rows.tiles(qkv.dtype, qkv.shape[3])), default=0)


@torch.library.custom_op("mtbert::attention", mutates_args=())
def _forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    dropout_row: Tensor | None,
    max_seqlen: int,
    scale: float,
    mask: list[int],
    step: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output and, where long sequences may occur, the logarithm of each row's sum of exponentials."""
    out, logsum = _empty(qkv, max_seqlen)
    if out.numel() == 0 or cu_seqlens.shape[0] == 1:
        return out.zero_(), logsum
    factor = scale * LOG2_E
    attention_rows.forward(qkv, out, cu_seqlens, dropout_row, max_seqlen, factor, (mask, step))
    if logsum.numel():
        attention_long.forward(
            qkv, out, logsum, cu_seqlens, dropout_row, _whole_rows(qkv), max_seqlen, factor, (mask, step)
        )
    return out, logsum


@_forward.register_fake
def _(
    qkv: Tensor,
    cu_seqlens: Tensor,
    dropout_row: Tensor | None,
    max_seqlen: int,
    scale: float,
    mask: list[int],
    step: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _empty(qkv, max_seqlen)


def _empty(qkv: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    tokens, _, heads, head_dim = qkv.shape
    rows = tokens if max_seqlen > _whole_rows(qkv) else 0
    return qkv.new_empty(tokens, heads, head_dim), qkv.new_empty(heads, rows, dtype=torch.float32)


@torch.library.custom_op("mtbert::attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor | None,
    logsum: Tensor | None,
    cu_seqlens: Tensor,
    dropout_row: Tensor | None,
    max_seqlen: int,
    scale: float,
    mask: list[int],
    step: Tensor | None,
) -> Tensor:
    """out and logsum: what forward returned, or None where no long sequence may occur."""
    dqkv = torch.empty_like(qkv)
    if dqkv.numel() == 0 or cu_seqlens.shape[0] == 1:
        return dqkv.zero_()
    factor = scale * LOG2_E
    attention_rows.backward(grad, qkv, dqkv, cu_seqlens, dropout_row, max_seqlen, scale, factor, (mask, step))
    if out is not None and logsum is not None:
        attention_long.backward(
            grad,
            qkv,
            out,
            logsum,
            dqkv,
            cu_seqlens,
            dropout_row,
            _whole_rows(qkv),
            max_seqlen,
            scale,
            factor,
            (mask, step),
        )
    return dqkv


@_backward.register_fake
def _(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor | None,
    logsum: Tensor | None,
    cu_seqlens: Tensor,
    dropout_row: Tensor | None,
    max_seqlen: int,
    scale: float,
    mask: list[int],
    step: Tensor | None,
) -> Tensor:
    return torch.empty_like(qkv)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the input alone, unless long sequences may occur."""
    qkv, cu_seqlens, dropout_row, max_seqlen, scale, mask, step = inputs
    long = max_seqlen > _whole_rows(qkv)
    ctx.save_for_backward(qkv, cu_seqlens, dropout_row, step, *(output if long else (None, None)))
    ctx.constants = (max_seqlen, scale, mask)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, cu_seqlens, dropout_row, step, out, logsum = ctx.saved_tensors
    max_seqlen, scale, mask = ctx.constants
    dqkv = None
    if grad is not None:
        dqkv = _backward(
            grad.contiguous(), qkv, out, logsum, cu_seqlens, dropout_row, max_seqlen, scale, mask, step
        )
    return dqkv, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
