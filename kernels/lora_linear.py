"""Products with low-rank adapters (Hu et al. 2021): the frozen weight's product plus scale * dropout(x) A^T B^T."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtbert.ranges import operation

from . import dispatch, extension, reference
from .casts import cast_weight
from .checks import check_dropout, check_parameter, fail
from .dropout import apply_mask
from .grouped import Split, deliver, split
from .linear import check_product, products, row_sums
from .lora_cuda import lora as fused
from .philox import Dropout
from .segments import Segments


@operation("lora_linear")
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
    """x weight^T + bias + scale (dropout(x) lora_a^T) lora_b^T.

    x: [T, K], contiguous; weight: [N, K]; bias: [N] or None; lora_a: [r, K]; lora_b: [N, r]; parameters of any floating
    dtype, cast to that of x (the weight once within `WeightCasts`). Gradients come back in the
    parameters' dtypes; none is computed for a frozen one. dropout_row: int32 [T]. segments: groups of the T rows;
    a parameter's companion gets one gradient a group instead of the parameter. Returns [T, N] in the dtype of x. Raises
    ValueError naming the argument that does not fit.
    """
    check_product("lora_linear", x, weight, bias)
    _check_adapter("lora_linear", "lora", (lora_a, lora_b), weight.shape[0], x)
    active = check_dropout("lora_linear", dropout_row, dropout, x)
    named = {"weight": weight, "bias": bias, "lora a": lora_a, "lora b": lora_b}
    parts = split("lora_linear", segments, x.shape[0], named)
    implementation = _select("lora_linear", x, parts)
    if implementation == "reference":
        return reference.lora_linear(
            x,
            weight,
            bias,
            lora_a,
            lora_b,
            scale=scale,
            dropout_row=dropout_row,
            dropout=active,
            segments=segments,
        )
    return _adapted(implementation, x, weight, scale, dropout_row, active, segments, parts)


@operation("lora_qkv")
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
    """Queries, keys and values of one weight [3C, K], each with its adapter or None, under one mask.

    adapters: three of (lora_a [r, K], lora_b [C, r]) or None; ranks may differ. Two of them, and a weight [2C, K], are
    keys and values alone. The rest as in `lora_linear`. Returns [T, 3C] (or [T, 2C]) in the dtype of x.
    """
    check_product("lora_qkv", x, weight, bias)
    blocks = len(adapters)
    if blocks not in (2, 3):
        fail("lora_qkv", "adapters", "three pairs or None (or two)", f"{blocks} elements")
    if weight.shape[0] % blocks:
        fail("lora_qkv", "weight", f"of shape [{blocks}C, K]", f"shape {list(weight.shape)}")
    named = {"weight": weight, "bias": bias}
    for index, adapter in enumerate(adapters):
        if adapter is not None:
            _check_adapter("lora_qkv", f"adapters[{index}]", adapter, weight.shape[0] // blocks, x)
        a, b = (None, None) if adapter is None else adapter
        named |= {f"adapters[{index}] a": a, f"adapters[{index}] b": b}
    active = check_dropout("lora_qkv", dropout_row, dropout, x)
    parts = split("lora_qkv", segments, x.shape[0], named)
    implementation = _select("lora_qkv", x, parts)
    if implementation == "reference":
        return reference.lora_qkv(
            x,
            weight,
            bias,
            adapters,
            scale=scale,
            dropout_row=dropout_row,
            dropout=active,
            segments=segments,
        )
    return _adapted(implementation, x, weight, scale, dropout_row, active, segments, parts)


def _select(operation: str, x: Tensor, parts: Split) -> str:
    """The implementation for a call, whose parameters are weight, bias, and A and B of each block."""
    weight = parts.parameters[0]
    assert weight is not None
    constants = (*parts.parameters[:2], *parts.companions[:2])
    ranks = [a.shape[0] for a in parts.parameters[2::2] if a is not None]
    implementation, _ = dispatch.select(
        operation,
        device=x.device.type,
        dtype=x.dtype,
        capability=extension.capability(x.device),
        rank=max(ranks, default=0),
        inputs=weight.shape[1],
        outputs=weight.shape[0],
        frozen=not (torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in constants)),
    )
    return implementation


def _adapted(
    implementation: str,
    x: Tensor,
    weight: Tensor,
    scale: float,
    dropout_row: Tensor | None,
    dropout: Dropout | None,
    segments: Segments | None,
    parts: Split,
) -> Tensor:
    """By the extension where it serves, else by PyTorch's products. weight: the first of the parts' parameters."""
    groups, parameters, companions = parts
    cast = cast_weight(weight, x.dtype)
    if implementation != "cuda":
        blocks = len(parameters) // 2 - 1
        return _Lora.apply(x, scale, dropout_row, dropout, blocks, groups, cast, *parameters, *companions)
    if cast is not None:  # it is frozen, so that the kernels need no more of it
        parameters = [cast, *parameters[1:]]
    bounds = segments.bounds_on(x.device) if segments is not None and len(groups) > 1 else None
    rows = None if dropout is None else dropout_row
    return fused(x, parameters, companions, scale, rows, dropout, bounds, len(groups))


def _check_adapter(
    operation: str, argument: str, adapter: tuple[Tensor, Tensor], outputs: int, x: Tensor
) -> None:
    a, b = adapter
    check_parameter(operation, f"{argument} a", a, (None, x.shape[1]), x)
    check_parameter(operation, f"{argument} b", b, (outputs, a.shape[0]), x)


_TAKERS = 7
"""The first argument of `_Lora.forward` that takes a gradient, beside x."""


class _Lora(torch.autograd.Function):
    """`blocks` stacked products with an adapter each, done as two thin products for all of them.

    The adapters' A are stacked to [R, K] (R: the sum of the ranks), scale * B are the blocks of a block-diagonal
    [N, R]. Saved are x, s = dropout(x) A^T and the small matrices; dropout(x) is made again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: float,
        dropout_row: Tensor | None,
        dropout: Dropout | None,
        blocks: int,
        groups: list[slice],
        cast: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        *rest: Tensor | None,
    ) -> Tensor:
        """cast: the weight's, where it is kept; rest: A and B of each block, then the companions of all parameters."""
        adapters = rest[: 2 * blocks]
        if cast is None:
            cast = weight.to(x.dtype)
        present = [a for a in adapters[::2] if a is not None]
        stacked_a = stacked_b = s = None
        with _in_dtype_of(x):
            out = F.linear(x, cast, None if bias is None else bias.to(x.dtype))
            if present:
                stacked_a = torch.cat(present).to(x.dtype)
                stacked_b = _block_diagonal(adapters, weight.shape[0] // blocks, scale, x)
                s = _dropped(x, dropout_row, dropout) @ stacked_a.t()
                out.addmm_(s, stacked_b.t())
        ctx.constants = (scale, dropout, blocks, groups)
        ctx.ranks = [0 if a is None else a.shape[0] for a in adapters[::2]]
        ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias, *adapters)]
        need_weight, _, *need_adapters = _Lora.needs(ctx)
        ctx.save_for_backward(
            x if need_weight or any(need_adapters[::2]) else None,
            cast if ctx.needs_input_grad[0] else None,
            dropout_row,
            stacked_a,
            stacked_b,
            s,
        )
        return out

    @staticmethod
    def needs(ctx: Any) -> list[bool]:
        """For weight, bias and adapters: whether they or their companions need a gradient."""
        count = len(ctx.dtypes)
        flags = ctx.needs_input_grad[_TAKERS:]
        return [
            parameter or companion for parameter, companion in zip(flags[:count], flags[count:], strict=True)
        ]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with _in_dtype_of(grad):
            return _Lora.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, dropout_row, stacked_a, stacked_b, s = ctx.saved_tensors
        scale, dropout, blocks, groups = ctx.constants
        needs = _Lora.needs(ctx)
        grad = grad.contiguous()
        dx = grad @ weight if ctx.needs_input_grad[0] else None
        sums: list[Tensor | None] = [None] * len(needs)
        if needs[0]:
            sums[0] = products(grad, x, groups)
        if needs[1]:
            sums[1] = row_sums(grad, groups)
        if stacked_a is not None:
            ds = grad @ stacked_b
            if dx is not None:
                dx += _dropped(ds @ stacked_a, dropout_row, dropout)
            if any(needs[2::2]):
                sums[2::2] = products(ds, _dropped(x, dropout_row, dropout), groups).split(ctx.ranks, dim=1)
            if any(needs[3::2]):
                # An adapter's outputs are those of its block.
                parts = products(grad, s, groups).split(ctx.ranks, dim=2)
                sums[3::2] = [part.chunk(blocks, dim=1)[block] for block, part in enumerate(parts)]
        for index, (share, dtype) in enumerate(zip(sums, ctx.dtypes, strict=True)):
            if share is None or not needs[index]:
                sums[index] = None
            elif index >= 3 and index % 2:
                sums[index] = (share.to(dtype) * scale).contiguous()
            else:
                sums[index] = share.to(dtype).contiguous()
        flags = ctx.needs_input_grad[_TAKERS:]
        gradients = deliver(sums, flags[: len(needs)], flags[len(needs) :])
        return (dx, *(None for _ in range(_TAKERS - 1)), *gradients)


def _in_dtype_of(x: Tensor) -> AbstractContextManager[Any]:
    """Within a `with` block, products are in the dtype of their operands, also under autocast, as the kernels' are."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


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
