"""Products with low-rank adapters (Hu et al. 2021): the frozen weight's product plus scale * dropout(x) A^T B^T."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch, reference
from .checks import check_dropout, check_parameter, fail
from .dropout import apply_mask
from .linear import bias_gradient, check_product
from .philox import Dropout


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
) -> Tensor:
    """x weight^T + bias + scale (dropout(x) lora_a^T) lora_b^T.

    x: [T, K], contiguous; weight: [N, K]; bias: [N] or None; lora_a: [r, K]; lora_b: [N, r]; parameters of any floating
    dtype, cast to that of x (give a frozen weight in the dtype of x, and no cast is made). Gradients come back in the
    parameters' dtypes; none is computed for a frozen one. dropout_row: int32 [T]. Returns [T, N] in the dtype of x.
    Raises ValueError naming the argument that does not fit.
    """
    check_product("lora_linear", x, weight, bias)
    _check_adapter("lora_linear", "lora", (lora_a, lora_b), weight.shape[0], x)
    active = check_dropout("lora_linear", dropout_row, dropout, x)
    implementation, _ = dispatch.select("lora_linear", device=x.device.type, dtype=x.dtype)
    if implementation == "reference":
        return reference.lora_linear(
            x, weight, bias, lora_a, lora_b, scale=scale, dropout_row=dropout_row, dropout=active
        )
    return _Lora.apply(x, weight, bias, scale, dropout_row, active, 1, lora_a, lora_b)


def lora_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: tuple[tuple[Tensor, Tensor] | None, ...],
    *,
    scale: float,
    dropout_row: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """Queries, keys and values of one weight [3C, K], each with its adapter or None, under one mask.

    adapters: three of (lora_a [r, K], lora_b [C, r]) or None; ranks may differ. The rest as in `lora_linear`. Returns
    [T, 3C] in the dtype of x.
    """
    check_product("lora_qkv", x, weight, bias)
    if len(adapters) != 3:
        fail("lora_qkv", "adapters", "three pairs or None", f"{len(adapters)} elements")
    if weight.shape[0] % 3:
        fail("lora_qkv", "weight", "of shape [3C, K]", f"shape {list(weight.shape)}")
    for index, adapter in enumerate(adapters):
        if adapter is not None:
            _check_adapter("lora_qkv", f"adapters[{index}]", adapter, weight.shape[0] // 3, x)
    active = check_dropout("lora_qkv", dropout_row, dropout, x)
    implementation, _ = dispatch.select("lora_qkv", device=x.device.type, dtype=x.dtype)
    if implementation == "reference":
        return reference.lora_qkv(
            x, weight, bias, adapters, scale=scale, dropout_row=dropout_row, dropout=active
        )
    flat = [part for adapter in adapters for part in (adapter if adapter is not None else (None, None))]
    return _Lora.apply(x, weight, bias, scale, dropout_row, active, 3, *flat)


def _check_adapter(
    operation: str, argument: str, adapter: tuple[Tensor, Tensor], outputs: int, x: Tensor
) -> None:
    a, b = adapter
    check_parameter(operation, f"{argument} a", a, (None, x.shape[1]), x)
    check_parameter(operation, f"{argument} b", b, (outputs, a.shape[0]), x)


class _Lora(torch.autograd.Function):
    """`blocks` stacked products with an adapter each, done as two thin products for all of them.

    The adapters' A are stacked to [R, K] (R: the sum of the ranks), scale * B are the blocks of a block-diagonal
    [N, R]. Saved are x, s = dropout(x) A^T and the small matrices; dropout(x) is made again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        dropout_row: Tensor | None,
        dropout: Dropout | None,
        blocks: int,
        *adapters: Tensor | None,
    ) -> Tensor:
        cast_weight = weight.to(x.dtype)
        out = F.linear(x, cast_weight, None if bias is None else bias.to(x.dtype))
        present = [a for a in adapters[::2] if a is not None]
        stacked_a = stacked_b = s = None
        if present:
            stacked_a = torch.cat(present).to(x.dtype)
            stacked_b = _block_diagonal(adapters, weight.shape[0] // blocks, scale, x)
            s = _dropped(x, dropout_row, dropout) @ stacked_a.t()
            out.addmm_(s, stacked_b.t())
        need_x, need_weight = ctx.needs_input_grad[:2]
        need_a = any(ctx.needs_input_grad[7::2])
        ctx.save_for_backward(
            x if need_weight or need_a else None,
            cast_weight if need_x else None,
            dropout_row,
            stacked_a,
            stacked_b,
            s,
        )
        ctx.constants = (scale, dropout, blocks)
        ctx.ranks = [0 if a is None else a.shape[0] for a in adapters[::2]]
        ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias, *adapters)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, dropout_row, stacked_a, stacked_b, s = ctx.saved_tensors
        scale, dropout, blocks = ctx.constants
        need_x, need_weight, need_bias, _, _, _, _, *need_adapters = ctx.needs_input_grad
        weight_dtype, bias_dtype, *adapter_dtypes = ctx.dtypes
        grad = grad.contiguous()
        dx = grad @ weight if need_x else None
        dweight = (grad.t() @ x).to(weight_dtype) if need_weight else None
        dbias = bias_gradient(grad, bias_dtype) if need_bias else None
        dadapters: list[Tensor | None] = [None] * len(adapter_dtypes)
        if stacked_a is not None:
            ds = grad @ stacked_b
            if dx is not None:
                dx += _dropped(ds @ stacked_a, dropout_row, dropout)
            outputs = grad.shape[1] // blocks
            if any(need_adapters[::2]):
                da = (ds.t() @ _dropped(x, dropout_row, dropout)).split(ctx.ranks)
                for index in range(0, 2 * blocks, 2):
                    if need_adapters[index]:
                        dadapters[index] = da[index // 2].to(adapter_dtypes[index])
            if any(need_adapters[1::2]):
                db = (grad.t() @ s).split(ctx.ranks, dim=1)
                for index in range(1, 2 * blocks, 2):
                    if need_adapters[index]:
                        own = db[index // 2][index // 2 * outputs : (index // 2 + 1) * outputs]
                        dadapters[index] = (own.to(adapter_dtypes[index]) * scale).contiguous()
        return dx, dweight, dbias, None, None, None, None, *dadapters


def _dropped(x: Tensor, dropout_row: Tensor | None, dropout: Dropout | None) -> Tensor:
    if dropout is None or dropout_row is None:
        return x
    return apply_mask(x, dropout_row, dropout)


def _block_diagonal(adapters: tuple[Tensor | None, ...], outputs: int, scale: float, like: Tensor) -> Tensor:
    """scale * B of each block, beside and below each other: [blocks * outputs, R]."""
    ranks = sum(a.shape[0] for a in adapters[::2] if a is not None)
    result = like.new_zeros(len(adapters) // 2 * outputs, ranks)
    first = 0
    for block, b in enumerate(adapters[1::2]):
        if b is not None:
            result[block * outputs : (block + 1) * outputs, first : first + b.shape[1]] = b * scale
            first += b.shape[1]
    return result
