"""What a call of an operation needs at least, from its arguments: each function takes those of the operation.

Shapes and dtypes are read at once. What stands in the memory of a device (lengths, words) is read when the cost is
asked for, so that nothing waits for the device while it is being profiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtbert.engine import costs
from mtbert.engine.costs import Cost
from mtbert.kernels import Dropout, Segments

Later = Callable[[], Cost]


def cost_of(operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Later | None:
    """The cost of a call, to be asked for later; None for an operation without a formula."""
    formula = _FORMULAS.get(operation)
    return None if formula is None else formula(*args, **kwargs)


def _trained(segments: Segments | None, *parameters: Tensor | None) -> bool:
    """Whether a backward pass would compute the gradient of a parameter, or of a companion."""
    companions = {} if segments is None else segments.companions
    return torch.is_grad_enabled() and any(
        p is not None and (p.requires_grad or p in companions) for p in parameters
    )


def _needed(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _groups(segments: Segments | None) -> int:
    return 0 if segments is None else segments.count


def _dropout(x: Tensor, dropout_row: Tensor, dropout: Dropout | None) -> Later:
    return partial(costs.dropout, tokens=x.shape[0], width=x.shape[1], size=x.dtype.itemsize)


def _attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    dropout_row: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Later:
    heads, width = qkv.shape[2], qkv.shape[2] * qkv.shape[3]
    size, masked = qkv.dtype.itemsize, dropout is not None
    return lambda: costs.attention(
        lengths=cu_seqlens.diff().cpu().numpy(), width=width, heads=heads, size=size, masked=masked
    )


def _first_token_attention(
    query: Tensor,
    key_value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    dropout_row: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Later:
    heads, width = query.shape[1], query.shape[1] * query.shape[2]
    size, masked = query.dtype.itemsize, dropout is not None
    return lambda: costs.first_token_attention(
        lengths=cu_seqlens.diff().cpu().numpy(), width=width, heads=heads, size=size, masked=masked
    )


def _add_layer_norm(
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
) -> Later:
    return partial(
        costs.add_layer_norm,
        tokens=x.shape[0],
        width=x.shape[1],
        size=x.dtype.itemsize,
        parameter=weight.dtype.itemsize,
        masked=dropout is not None,
        groups=_groups(segments),
        trained=_trained(segments, weight, bias, linear_bias),
    )


def _bias_gelu(x: Tensor, bias: Tensor, *, segments: Segments | None = None) -> Later:
    return partial(
        costs.bias_gelu,
        tokens=x.shape[0],
        inner=x.shape[1],
        size=x.dtype.itemsize,
        parameter=bias.dtype.itemsize,
        groups=_groups(segments),
        trained=_trained(segments, bias),
    )


def _embedding(
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
) -> Later:
    words, position_table, types = tables
    sizes: dict[str, Any] = {
        "tokens": ids.shape[0],
        "width": words.shape[1],
        "tables": (words.shape[0], position_table.shape[0], types.shape[0]),
        "size": dtype.itemsize,
        "parameter": words.dtype.itemsize,
        "masked": dropout is not None,
        "groups": _groups(segments),
        "slots": segments is not None and segments.slots is not None,
        "trained": _trained(segments, *tables, weight, bias),
    }
    return lambda: costs.embedding(
        words=int(torch.unique(ids).numel()), longest=int(positions.max()) + 1, **sizes
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, segments: Segments | None = None) -> Later:
    return partial(
        costs.linear,
        rows=x.shape[0],
        inputs=weight.shape[1],
        outputs=weight.shape[0],
        size=x.dtype.itemsize,
        parameter=weight.dtype.itemsize,
        groups=_groups(segments),
        needs_input=_needed(x),
        trained=_trained(segments, weight),
    )


def _head_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, segments: Segments | None = None
) -> Later:
    heads, outputs, inputs = weight.shape
    return partial(
        costs.linear,
        rows=x.shape[0] * heads,
        inputs=inputs,
        outputs=outputs,
        size=x.dtype.itemsize,
        # Every head has a matrix of its own, which only its share of the rows meets.
        parameter=weight.dtype.itemsize * heads,
        groups=_groups(segments),
        needs_input=_needed(x),
        trained=_trained(segments, weight),
    )


def _lora_linear(
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
) -> Later:
    return _adapted(x, weight, [(lora_a, lora_b)], segments)


def _lora_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: tuple[tuple[Tensor, Tensor] | None, ...],
    *,
    scale: float,
    dropout_row: Tensor | None = None,
    dropout: Dropout | None = None,
    segments: Segments | None = None,
) -> Later:
    return _adapted(x, weight, [adapter for adapter in adapters if adapter is not None], segments)


def _adapted(
    x: Tensor, weight: Tensor, adapters: Sequence[tuple[Tensor, Tensor]], segments: Segments | None
) -> Later:
    parts: list[Later] = [
        _linear(x, weight, None, segments=segments),
        *(
            partial(
                costs.adapter,
                rows=x.shape[0],
                inputs=a.shape[1],
                outputs=b.shape[0],
                rank=a.shape[0],
                size=x.dtype.itemsize,
                parameter=a.dtype.itemsize,
                groups=_groups(segments),
                needs_input=_needed(x),
            )
            for a, b in adapters
        ),
    ]
    return lambda: costs.total(part() for part in parts)


_FORMULAS: dict[str, Callable[..., Later]] = {
    "dropout": _dropout,
    "attention": _attention,
    "first_token_attention": _first_token_attention,
    "add_layer_norm": _add_layer_norm,
    "bias_gelu": _bias_gelu,
    "embedding": _embedding,
    "linear": _linear,
    "head_linear": _head_linear,
    "lora_linear": _lora_linear,
    "lora_qkv": _lora_qkv,
}
PRODUCTS = ("linear", "head_linear", "lora_linear", "lora_qkv", "attention", "first_token_attention")
"""Operations whose FLOPs are those of matrix products, but for attention's softmax: its share is a few per cent."""
