"""The plain PyTorch twin of every operation: the specification that the fast implementations are held against.

Same signatures as the public functions, any floating dtype, any device, differentiable by autograd alone. Half-width
inputs are computed in float32 and rounded once at the end; float64 stays float64. No device value is read, so that
these serve training wherever no faster implementation does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .philox import HEAD_COLUMNS, LANES, Dropout, dropout_mask, keep_groups, leading_columns_mask, philox4x32
from .segments import Segments

__all__ = [
    "add_layer_norm",
    "attention",
    "bias_gelu",
    "dropout",
    "dropout_mask",
    "embedding",
    "first_token_attention",
    "head_linear",
    "linear",
    "lora_linear",
    "lora_qkv",
    "philox4x32",
    "softmax",
]

_MAX_SCORES = 1 << 24
"""Attention scores computed at once; longer batches go in groups of sequences, so that memory stays bounded."""


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _drop(x: Tensor, dropout_row: Tensor | None, dropout: Dropout | None) -> Tensor:
    if dropout is None or dropout.threshold == 0:
        return x
    assert dropout_row is not None
    kept = leading_columns_mask(dropout_row, x.shape[1], dropout)
    return torch.where(kept, x * dropout.scale, 0.0)


def _of_groups(
    segments: Segments | None, parameters: tuple[Tensor | None, ...], call: Callable[..., Tensor]
) -> Tensor:
    """call(rows, *parameters) of each group, end to end.

    A parameter that has a companion is taken as a constant plus the zeros of the group's part of the companion, which
    thereby gets the gradient.
    """
    if segments is None:
        return call(slice(None), *parameters)
    companions = segments.companions

    def own(parameter: Tensor | None, group: int) -> Tensor | None:
        if parameter is None or parameter not in companions:
            return parameter
        return parameter.detach() + companions[parameter][group]

    ranges = enumerate(segments.ranges())
    return torch.cat([call(rows, *(own(p, group) for p in parameters)) for group, rows in ranges])


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def dropout(x: Tensor, dropout_row: Tensor, dropout: Dropout | None) -> Tensor:
    """Dropout of x [T, C] by the stateless mask."""
    return _drop(_wide(x), dropout_row, dropout).to(x.dtype)


def softmax(
    x: Tensor,
    *,
    lengths: Tensor | None = None,
    dropout_row: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """Softmax of the leading lengths[m] columns of each row of x [M, C], zeros beyond, then dropout."""
    if lengths is None:
        probabilities = _wide(x).softmax(dim=1)
    else:
        inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        # An empty row is NaN between the two selections, which keep it out of the result and of the gradient.
        probabilities = torch.where(inside, _wide(x), -math.inf).softmax(dim=1)
        probabilities = torch.where(inside, probabilities, 0.0)
    return _drop(probabilities, dropout_row, dropout).to(x.dtype)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    dropout_row: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """Softmax attention within each sequence: padded to max_seqlen, masked, and gathered back to the tokens."""
    tokens, _, heads, head_dim = qkv.shape
    sequences = cu_seqlens.shape[0] - 1
    if tokens == 0 or sequences == 0:
        return qkv.new_zeros(tokens, heads, head_dim) + 0 * qkv.sum()
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - starts
    position = torch.arange(max_seqlen, device=qkv.device)
    inside = position < lengths[:, None]
    index = (starts[:, None] + position).clamp(max=tokens - 1)

    group = max(1, _MAX_SCORES // (heads * max_seqlen * max_seqlen))
    padded = []
    for first in range(0, sequences, group):
        some = slice(first, first + group)
        rows = None if dropout_row is None else dropout_row[index[some]]
        padded.append(_padded_attention(_wide(qkv)[index[some]], inside[some], scale, rows, dropout))

    token = torch.arange(tokens, device=qkv.device)
    sequence = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
    covered = (sequence >= 0) & (sequence < sequences)
    sequence = sequence.clamp(0, sequences - 1)
    slot = sequence * max_seqlen + (token - starts[sequence]).clamp(0, max_seqlen - 1)
    gathered = torch.cat(padded).flatten(0, 1)[slot]
    return torch.where(covered[:, None, None], gathered, 0.0).to(qkv.dtype)


def _padded_attention(
    qkv: Tensor, inside: Tensor, scale: float, dropout_row: Tensor | None, dropout: Dropout | None
) -> Tensor:
    """qkv [N, L, 3, H, D], inside bool [N, L], dropout_row [N, L] -> [N, L, H, D]."""
    count, length, _, heads, _ = qkv.shape
    # Selected, not multiplied: what lies outside the sequences may be NaN.
    q, k, v = torch.where(inside[:, :, None, None, None], qkv, 0.0).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(2, 3)) * scale
    scores = scores.masked_fill(~inside[:, None, None, :], torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(dim=-1)
    if dropout is not None and dropout.threshold > 0:
        assert dropout_row is not None
        groups = -(-length // LANES)
        first_group = torch.arange(heads, device=qkv.device) * (HEAD_COLUMNS // LANES)
        columns = first_group[:, None] + torch.arange(groups, device=qkv.device)
        kept = keep_groups(dropout_row.flatten(), columns.flatten(), dropout)
        kept = kept.view(count, length, heads, groups * LANES)[..., :length].transpose(1, 2)
        probabilities = torch.where(kept, probabilities * dropout.scale, 0.0)
    return (probabilities @ v).transpose(1, 2)


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
    """Softmax attention of one query [H, D] a sequence: keys and values padded to max_seqlen, and masked."""
    tokens, _, heads, _ = key_value.shape
    if tokens == 0 or query.shape[0] == 0:
        return query.new_zeros(query.shape) + 0 * (query.sum() + key_value.sum())
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - starts
    position = torch.arange(max_seqlen, device=query.device)
    inside = position < lengths[:, None]
    padded = _wide(key_value)[(starts[:, None] + position).clamp(max=tokens - 1)]
    # Selected, not multiplied: what lies outside the sequences may be NaN.
    k, v = torch.where(inside[:, :, None, None, None], padded, 0.0).permute(2, 0, 3, 1, 4)
    q = _wide(query)[:, :, None]
    scores = (q @ k.transpose(2, 3)).squeeze(2) * scale
    scores = scores.masked_fill(~inside[:, None, :], torch.finfo(scores.dtype).min)
    probabilities = torch.where(inside[:, None, :], scores.softmax(dim=-1), 0.0)
    if dropout is not None and dropout.threshold > 0:
        assert dropout_row is not None
        groups = -(-max_seqlen // LANES)
        first_group = torch.arange(heads, device=query.device) * (HEAD_COLUMNS // LANES)
        columns = first_group[:, None] + torch.arange(groups, device=query.device)
        kept = keep_groups(dropout_row, columns.flatten(), dropout)
        kept = kept.view(-1, heads, groups * LANES)[..., :max_seqlen]
        probabilities = torch.where(kept, probabilities * dropout.scale, 0.0)
    return (probabilities[:, :, None] @ v).squeeze(2).to(query.dtype)


def embedding(
    ids: Tensor,
    type_ids: Tensor,
    positions: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
    dropout_row: Tensor | None = None,
    dropout: Dropout | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[ids] + position[positions] + token_type[type_ids])) in dtype."""
    words, position_table, types = tables
    word = _look_up_words(ids, words, segments)

    def call(rows: slice, position_table: Tensor, types: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        position, token_type = (
            F.embedding(positions[rows], position_table),
            F.embedding(type_ids[rows], types),
        )
        total = _wide(word[rows]) + _wide(position) + _wide(token_type)
        if dtype == torch.float64:
            total = total.double()
        normed = _layer_norm(total, weight, bias, eps)
        return _drop(normed, _rows(dropout_row, rows), dropout).to(dtype)

    return _of_groups(segments, (position_table, types, weight, bias), call)


def _look_up_words(ids: Tensor, words: Tensor, segments: Segments | None) -> Tensor:
    """words[ids], whose gradient goes to the companion where there is one: by slot, else by id."""
    companion = None if segments is None else segments.companions.get(words)
    if segments is None or companion is None:
        return F.embedding(ids, words)
    index = ids if segments.slots is None else segments.slots
    zeros = [F.embedding(index[rows], companion[group]) for group, rows in enumerate(segments.ranges())]
    return F.embedding(ids, words.detach()) + torch.cat(zeros)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight.to(x.dtype), bias.to(x.dtype), eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    linear_bias: Tensor | None = None,
    eps: float,
    dropout_row: Tensor | None = None,
    dropout: Dropout | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """LayerNorm(residual + dropout(x + linear_bias)) over the last dimension of [T, C]."""

    def call(rows: slice, weight: Tensor, bias: Tensor, linear_bias: Tensor | None) -> Tensor:
        branch = _wide(x[rows])
        if linear_bias is not None:
            branch = branch + linear_bias.to(branch.dtype)
        total = _wide(residual[rows]) + _drop(branch, _rows(dropout_row, rows), dropout)
        return _layer_norm(total, weight, bias, eps).to(x.dtype)

    return _of_groups(segments, (weight, bias, linear_bias), call)


def bias_gelu(x: Tensor, bias: Tensor, *, segments: Segments | None = None) -> Tensor:
    """z Phi(z) with z = x + bias and the exact normal distribution function Phi (Hendrycks, Gimpel 2016)."""

    def call(rows: slice, bias: Tensor) -> Tensor:
        z = _wide(x[rows])
        z = z + bias.to(z.dtype)
        return (z * 0.5 * (1.0 + torch.erf(z * math.sqrt(0.5)))).to(x.dtype)

    return _of_groups(segments, (bias,), call)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, segments: Segments | None = None) -> Tensor:
    """x weight^T + bias in the dtype of x."""

    def call(rows: slice, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x[rows], weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    return _of_groups(segments, (weight, bias), call)


def head_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, segments: Segments | None = None
) -> Tensor:
    """weight[h] x[t, h] + bias[h] in the dtype of x; bias: [H * E]."""

    def call(rows: slice, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.einsum("thd,hed->the", x[rows], weight.to(x.dtype)).contiguous()
        return out if bias is None else out + bias.to(x.dtype).view(weight.shape[:2])

    return _of_groups(segments, (weight, bias), call)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    dropout_row: Tensor | None = None,
    dropout: Dropout | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """x weight^T + bias + scale (dropout(x) lora_a^T) lora_b^T (Hu et al. 2021, equation 3)."""
    dropped = _drop(_wide(x), dropout_row, dropout).to(x.dtype)
    low = linear(linear(dropped, lora_a, None, segments=segments), lora_b, None, segments=segments)
    return linear(x, weight, bias, segments=segments) + scale * low


def lora_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: tuple[tuple[Tensor, Tensor] | None, ...],
    *,
    scale: float,
    dropout_row: Tensor | None = None,
    dropout: Dropout | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """Three projections in one [3C, K] weight (or two in [2C, K]), each with its adapter or None; one mask for all."""
    dropped = _drop(_wide(x), dropout_row, dropout).to(x.dtype)
    outputs = []
    bases = linear(x, weight, bias, segments=segments).chunk(len(adapters), dim=1)
    for base, adapter in zip(bases, adapters, strict=True):
        if adapter is None:
            outputs.append(base)
        else:
            low = linear(
                linear(dropped, adapter[0], None, segments=segments), adapter[1], None, segments=segments
            )
            outputs.append(base + scale * low)
    return torch.cat(outputs, dim=1)
