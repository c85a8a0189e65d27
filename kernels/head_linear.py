"""A linear map of its own for every attention head, in the activations' dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtbert.ranges import operation

from . import dispatch, reference
from .casts import cast_weight
from .checks import check_parameter, check_tensor
from .grouped import deliver, split
from .linear import row_sums
from .segments import Segments


@operation("head_linear")
def head_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, segments: Segments | None = None
) -> Tensor:
    """out[t, h] = weight[h] x[t, h] + bias[h].

    x: [T, H, D], contiguous; weight: [H, E, D]; bias: [H * E] or None; parameters of any floating dtype: they are
    cast to that of x, and their gradients come back in theirs. segments: groups of the T rows; a parameter's companion
    gets one gradient a group instead of the parameter. Returns [T, H, E] in the dtype of x. Raises ValueError naming
    the argument that does not fit.
    """
    check_tensor("head_linear", "x", x, (None, None, None))
    check_parameter("head_linear", "weight", weight, (x.shape[1], None, x.shape[2]), x)
    if bias is not None:
        check_parameter("head_linear", "bias", bias, (weight.shape[0] * weight.shape[1],), x)
    named = {"weight": weight, "bias": bias}
    groups, parameters, companions = split("head_linear", segments, x.shape[0], named)
    implementation, _ = dispatch.select("head_linear", device=x.device.type, dtype=x.dtype)
    if implementation == "reference":
        return reference.head_linear(x, weight, bias, segments=segments)
    return _HeadLinear.apply(x, groups, cast_weight(weight, x.dtype), *parameters, *companions)


class _HeadLinear(torch.autograd.Function):
    """One batched product over the heads; saves the cast weight, and x where the weight is trained.

    cast: the weight's, where it is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        groups: list[slice],
        cast: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        *companions: Tensor | None,
    ) -> Tensor:
        need_x, _, _, need_weight, _, need_weights, _ = ctx.needs_input_grad
        if cast is None:
            cast = weight.to(x.dtype)
        ctx.save_for_backward(x if need_weight or need_weights else None, cast if need_x else None)
        ctx.groups = groups
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        out = torch.bmm(x.transpose(0, 1), cast.transpose(1, 2)).transpose(0, 1).contiguous()
        return out if bias is None else out.add_(bias.to(x.dtype).view(weight.shape[:2]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, _, _, *need_parameters = ctx.needs_input_grad[:5]
        need_companions = ctx.needs_input_grad[5:]
        need_weight, need_bias = map(any, zip(need_parameters, need_companions, strict=True))
        weight_dtype, bias_dtype = ctx.dtypes
        grad = grad.contiguous()
        by_head = grad.transpose(0, 1)
        dx = torch.bmm(by_head, weight).transpose(0, 1).contiguous() if need_x else None
        dweight = dbias = None
        if need_weight:
            products = [torch.bmm(by_head[:, r].transpose(1, 2), x[r].transpose(0, 1)) for r in ctx.groups]
            dweight = torch.stack(products).to(weight_dtype)
        if need_bias:
            dbias = row_sums(grad.flatten(1), ctx.groups).to(bias_dtype)
        return dx, None, None, *deliver([dweight, dbias], need_parameters, need_companions)
