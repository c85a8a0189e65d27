"""Softmax attention within packed sequences, with dropout on the probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtbert.ranges import operation

from . import dispatch, extension, reference
from .checks import check_dropout, check_tensor, fail
from .philox import Dropout


@operation("attention")
def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    dropout_row: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """dropout(softmax(scale q k^T)) v for every sequence and head (Vaswani et al. 2017, equation 1).

    qkv: [T, 3, H, D], contiguous: queries, keys and values of the packed tokens. cu_seqlens: int32 [N + 1], ascending
    within 0 to T: sequence n is tokens cu_seqlens[n] : cu_seqlens[n + 1]; empty ones are allowed. max_seqlen: at least
    the longest length; the C++ kernels refuse a longer sequence, the Triton kernels, for which no length is read on the
    host, give NaN for all its outputs and gradients. dropout_row: int32 [T], the mask's row of each query token; the
    mask's column is 4096 head + key position. Returns [T, H, D] in the dtype of qkv, zeros for tokens of no sequence;
    nothing such a token holds reaches any output or gradient. Raises ValueError naming the argument that does not fit.
    """
    check_tensor("attention", "qkv", qkv, (None, 3, None, None))
    check_tensor("attention", "cu_seqlens", cu_seqlens, (None,), dtypes=(torch.int32,), device=qkv.device)
    if cu_seqlens.shape[0] == 0:
        fail("attention", "cu_seqlens", "of at least one element", "none")
    if max_seqlen < 1:
        fail("attention", "max_seqlen", "at least 1", max_seqlen)
    if not scale > 0:
        fail("attention", "scale", "positive", scale)
    active = check_dropout("attention", dropout_row, dropout, qkv)
    if active is None:
        dropout_row = None
    elif max_seqlen > 4096:
        fail("attention", "max_seqlen", "at most 4096 with dropout", max_seqlen)
    implementation, _ = dispatch.select(
        "attention", device=qkv.device.type, dtype=qkv.dtype, head_dim=qkv.shape[3], max_seqlen=max_seqlen
    )
    if implementation == "cpu":
        return _AttentionCpu.apply(qkv, cu_seqlens, max_seqlen, scale, dropout_row, active)
    if implementation == "triton":
        from .triton_ops.attention import attention as fused

        return fused(qkv, cu_seqlens, max_seqlen, scale, dropout_row, active)
    return reference.attention(
        qkv, cu_seqlens, max_seqlen, scale=scale, dropout_row=dropout_row, dropout=active
    )


class _AttentionCpu(torch.autograd.Function):
    """Saves its inputs only: probabilities and mask are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        dropout_row: Tensor | None,
        dropout: Dropout | None,
    ) -> Tensor:
        ctx.save_for_backward(qkv, cu_seqlens, dropout_row)
        ctx.constants = (max_seqlen, scale, dropout)
        out = qkv.new_empty(qkv.shape[0], *qkv.shape[2:])
        arguments = _arguments(qkv, cu_seqlens, max_seqlen, scale, dropout_row, dropout)
        extension.cpu().attention_forward(out=out.data_ptr(), **arguments)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cu_seqlens, dropout_row = ctx.saved_tensors
        max_seqlen, scale, dropout = ctx.constants
        grad = grad.contiguous()
        dqkv = torch.empty_like(qkv)
        arguments = _arguments(qkv, cu_seqlens, max_seqlen, scale, dropout_row, dropout)
        extension.cpu().attention_backward(dout=grad.data_ptr(), dqkv=dqkv.data_ptr(), **arguments)
        return dqkv, None, None, None, None, None


def _arguments(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    dropout_row: Tensor | None,
    dropout: Dropout | None,
) -> dict[str, Any]:
    return {
        "qkv": qkv.data_ptr(),
        "cu_seqlens": cu_seqlens.data_ptr(),
        "tokens": qkv.shape[0],
        "sequences": cu_seqlens.shape[0] - 1,
        "heads": qkv.shape[2],
        "head_dim": qkv.shape[3],
        "max_seqlen": max_seqlen,
        "scale": scale,
        "dtype": extension.DTYPE_NAMES[qkv.dtype],
        "threads": torch.get_num_threads(),
        **extension.dropout_arguments(dropout_row, dropout),
    }
