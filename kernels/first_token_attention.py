"""Softmax attention of one query a sequence: what a last layer needs whose first tokens alone are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtbert.ranges import operation

from . import dispatch, extension, reference
from .checks import check_dropout, check_tensor, fail
from .philox import HEAD_COLUMNS, Dropout


@operation("first_token_attention")
def first_token_attention(
    query: Tensor,
    key_value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    dropout_row: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """dropout(softmax(scale q k^T)) v for one query of every sequence and head: a row of what `attention` computes.

    query: [N, H, D], contiguous. key_value: [T, 2, H, D], contiguous, of the same dtype: keys and values of the packed
    tokens. cu_seqlens: int32 [N + 1], ascending within 0 to T: sequence n is tokens cu_seqlens[n] : cu_seqlens[n + 1];
    empty ones are allowed. max_seqlen: at least the longest length; the C++ kernels refuse a longer sequence, the
    Triton kernels, for which no length is read on the host, give NaN for its output and gradients. dropout_row: int32
    [N], the mask's row of each query; the mask's column is 4096 head + key position. Returns [N, H, D] in the dtype of
    query, zeros for an empty sequence; nothing that a token of no sequence holds reaches any output or gradient. Raises
    ValueError naming the argument that does not fit.
    """
    name = "first_token_attention"
    check_tensor(name, "query", query, (None, None, None))
    sizes = (None, 2, query.shape[1], query.shape[2])
    check_tensor(name, "key_value", key_value, sizes, dtypes=(query.dtype,), device=query.device)
    bounds = (query.shape[0] + 1,)
    check_tensor(name, "cu_seqlens", cu_seqlens, bounds, dtypes=(torch.int32,), device=query.device)
    if max_seqlen < 1:
        fail(name, "max_seqlen", "at least 1", max_seqlen)
    if not scale > 0:
        fail(name, "scale", "positive", scale)
    active = check_dropout(name, dropout_row, dropout, query)
    if active is not None and max_seqlen > HEAD_COLUMNS:
        fail(name, "max_seqlen", f"at most {HEAD_COLUMNS} with dropout", max_seqlen)
    implementation, _ = dispatch.select(
        name,
        device=query.device.type,
        dtype=query.dtype,
        head_dim=query.shape[2],
        max_seqlen=max_seqlen,
    )
    rows = None if active is None else dropout_row
    if implementation == "cpu":
        return _FirstTokenAttentionCpu.apply(query, key_value, cu_seqlens, max_seqlen, scale, rows, active)
    if implementation == "triton":
        from .triton_ops.first_token_attention import first_token_attention as fused

        return fused(query, key_value, cu_seqlens, max_seqlen, scale, rows, active)
    return reference.first_token_attention(
        query, key_value, cu_seqlens, max_seqlen, scale=scale, dropout_row=rows, dropout=active
    )


class _FirstTokenAttentionCpu(torch.autograd.Function):
    """Saves its inputs only: probabilities and mask are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key_value: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        dropout_row: Tensor | None,
        dropout: Dropout | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key_value, cu_seqlens, dropout_row)
        ctx.constants = (max_seqlen, scale, dropout)
        out = torch.empty_like(query)
        arguments = _arguments(query, key_value, cu_seqlens, max_seqlen, scale, dropout_row, dropout)
        extension.cpu().first_token_attention_forward(out=out.data_ptr(), **arguments)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key_value, cu_seqlens, dropout_row = ctx.saved_tensors
        max_seqlen, scale, dropout = ctx.constants
        grad = grad.contiguous()
        dquery, dkey_value = torch.empty_like(query), torch.empty_like(key_value)
        arguments = _arguments(query, key_value, cu_seqlens, max_seqlen, scale, dropout_row, dropout)
        extension.cpu().first_token_attention_backward(
            dout=grad.data_ptr(), dquery=dquery.data_ptr(), dkey_value=dkey_value.data_ptr(), **arguments
        )
        return dquery, dkey_value, None, None, None, None, None


def _arguments(
    query: Tensor,
    key_value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    dropout_row: Tensor | None,
    dropout: Dropout | None,
) -> dict[str, Any]:
    return {
        "query": query.data_ptr(),
        "key_value": key_value.data_ptr(),
        "cu_seqlens": cu_seqlens.data_ptr(),
        "tokens": key_value.shape[0],
        "sequences": query.shape[0],
        "heads": query.shape[1],
        "head_dim": query.shape[2],
        "max_seqlen": max_seqlen,
        "scale": scale,
        "dtype": extension.DTYPE_NAMES[query.dtype],
        "threads": torch.get_num_threads(),
        **extension.dropout_arguments(dropout_row, dropout),
    }
