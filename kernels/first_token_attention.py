"""Softmax attention of one query a sequence: what a last layer needs whose first tokens alone are read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtbert.ranges import operation

from . import dispatch, extension, reference
from .checks import check_dropout, check_tensor, fail
from .philox import HEAD_COLUMNS, LANES, Dropout, keep_groups


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
    empty ones are allowed. max_seqlen: at least the longest length; the C++ kernels refuse a longer sequence.
    dropout_row: int32 [N], the mask's row of each query; the mask's column is 4096 head + key position. Returns
    [N, H, D] in the dtype of query, zeros for an empty sequence; nothing that a token of no sequence holds reaches any
    output or gradient. Raises ValueError naming the argument that does not fit.
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
    if implementation == "reference":
        return reference.first_token_attention(
            query, key_value, cu_seqlens, max_seqlen, scale=scale, dropout_row=rows, dropout=active
        )
    return _FirstTokenAttention.apply(query, key_value, cu_seqlens, scale, rows, active)


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


class _Rows(NamedTuple):
    """Which sequence each token is in."""

    cu_seqlens: Tensor
    of_token: Tensor
    """int64 [T]: the token's sequence; N, which no sequence is, for a token of none."""

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int) -> _Rows:
        token = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
        # -1 before the first sequence: modulo N + 1 it becomes N, as behind the last.
        rows = (torch.searchsorted(cu_seqlens, token, right=True) - 1) % cu_seqlens.shape[0]
        return cls(cu_seqlens, rows)

    def spread(self, x: Tensor) -> Tensor:
        """[N, ...] -> [T, ...]: what a token's sequence has, zeros for a token of none."""
        return torch.cat((x, x.new_zeros(1, *x.shape[1:])))[self.of_token]

    def reduce(self, x: Tensor, how: str) -> Tensor:
        """[T, ...] -> [N, ...]: sum or max over each sequence's tokens. Deterministic on every device."""
        return torch.segment_reduce(x, how, offsets=self.cu_seqlens.long(), axis=0, unsafe=True)


def _kept(rows: _Rows, heads: int, dropout_row: Tensor, dropout: Dropout) -> Tensor:
    """The mask of each token as a key of its sequence's query, bool [T, H]; anything for a token of no sequence.

    One draw serves eight positions. A sequence of L tokens takes ceil(L / 8) draws a head, all of them together at most
    T / 8 + N, which is known without reading a length.
    """
    starts = rows.cu_seqlens.long()
    count = dropout_row.shape[0]
    tokens, device = len(rows.of_token), starts.device
    ends = ((starts.diff() + LANES - 1) // LANES).cumsum(0)
    draws = torch.arange(tokens // LANES + count, device=device)
    owner = torch.searchsorted(ends, draws, right=True).clamp(max=count - 1)
    first_draw = torch.nn.functional.pad(ends, (1, 0))
    head_groups = torch.arange(heads, device=device) * (HEAD_COLUMNS // LANES)
    groups = head_groups + (draws - first_draw[owner])[:, None]
    kept = keep_groups(dropout_row[owner], groups, dropout).transpose(1, 2)
    row = rows.of_token.clamp(max=count - 1)
    position = (torch.arange(tokens, device=device) - starts[row]).clamp(min=0)
    draw = (first_draw[row] + position // LANES).clamp(max=len(draws) - 1)
    return kept[draw, position % LANES]


class _FirstTokenAttention(torch.autograd.Function):
    """On packed tokens, in float32 at least; keeps its inputs and the probabilities [T, H]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key_value: Tensor,
        cu_seqlens: Tensor,
        scale: float,
        dropout_row: Tensor | None,
        dropout: Dropout | None,
    ) -> Tensor:
        ctx.scale, ctx.dropout = scale, dropout
        if not len(query) or not len(key_value):
            ctx.save_for_backward(query, key_value)
            return torch.zeros_like(query)
        rows = _Rows.of(cu_seqlens, len(key_value))
        key, value = _wide(key_value).unbind(1)
        scores = (rows.spread(_wide(query)) * key).sum(-1) * scale
        exponents = (scores - rows.spread(rows.reduce(scores, "max"))).exp()
        # Selected, not multiplied: a token of no sequence may hold NaN.
        inside = (rows.of_token < len(query))[:, None]
        exponents = torch.where(inside, exponents, 0.0)
        sums = rows.spread(rows.reduce(exponents, "sum"))
        probabilities = torch.where(inside, exponents / sums, 0.0)
        kept = None
        if dropout is not None and dropout_row is not None:
            kept = _kept(rows, query.shape[1], dropout_row, dropout)
        ctx.save_for_backward(query, key_value, cu_seqlens, rows.of_token, probabilities, kept)
        weights = _dropped(probabilities, kept, dropout)
        return rows.reduce(weights[:, :, None] * value, "sum").to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if len(ctx.saved_tensors) == 2:
            query, key_value = ctx.saved_tensors
            return torch.zeros_like(query), torch.zeros_like(key_value), None, None, None, None
        query, key_value, cu_seqlens, of_token, probabilities, kept = ctx.saved_tensors
        scale, dropout = ctx.scale, ctx.dropout
        rows = _Rows(cu_seqlens, of_token)
        key, value = _wide(key_value).unbind(1)
        gradient = rows.spread(_wide(grad))
        dkey_value = torch.empty_like(key_value)
        dkey_value[:, 1] = _dropped(probabilities, kept, dropout)[:, :, None] * gradient
        dprobabilities = _dropped((gradient * value).sum(-1), kept, dropout)
        along = rows.spread(rows.reduce(probabilities * dprobabilities, "sum"))
        inside = (of_token < len(query))[:, None]
        dscores = torch.where(inside, probabilities * (dprobabilities - along) * scale, 0.0)[:, :, None]
        dkey_value[:, 0] = dscores * rows.spread(_wide(query))
        dquery = rows.reduce(dscores * key, "sum").to(query.dtype)
        return dquery, dkey_value, None, None, None, None


def _dropped(x: Tensor, kept: Tensor | None, dropout: Dropout | None) -> Tensor:
    return x if kept is None or dropout is None else torch.where(kept, x * dropout.scale, 0.0)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
