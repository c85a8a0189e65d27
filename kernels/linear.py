"""The matrix product with a weight, in the activations' dtype."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtbert.ranges import operation

from . import dispatch, extension, reference
from .casts import cast_weight
from .checks import check_parameter, check_tensor
from .grouped import deliver, part, split
from .segments import Segments


@operation("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, segments: Segments | None = None) -> Tensor:
    """x weight^T + bias.

    x: [T, K], contiguous; weight: [N, K]; bias: [N] or None; parameters of any floating dtype: they are cast to that of
    x (free where they have it already; a weight once within `WeightCasts`), and their gradients come back in theirs;
    none is computed for a frozen one.
    segments: groups of the T rows; a parameter's companion gets one gradient a group instead of the parameter. Returns
    [T, N] in the dtype of x. Raises ValueError naming the argument that does not fit.
    """
    check_product("linear", x, weight, bias)
    groups, parameters, companions = split("linear", segments, x.shape[0], {"weight": weight, "bias": bias})
    implementation, _ = dispatch.select("linear", device=x.device.type, dtype=x.dtype)
    if implementation == "reference":
        return reference.linear(x, weight, bias, segments=segments)
    return _Linear.apply(x, groups, cast_weight(weight, x.dtype), *parameters, *companions)


def check_product(operation: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check the arguments that every product takes."""
    check_tensor(operation, "x", x, (None, None))
    check_parameter(operation, "weight", weight, (None, x.shape[1]), x)
    if bias is not None:
        check_parameter(operation, "bias", bias, (weight.shape[0],), x)


class _Linear(torch.autograd.Function):
    """Keeps the cast weight for the input's gradient, and x only where the weight is trained. cast: the weight's."""

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
        return F.linear(x, cast, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, _, _, *need_parameters = ctx.needs_input_grad[:5]
        need_companions = ctx.needs_input_grad[5:]
        need_weight, need_bias = map(any, zip(need_parameters, need_companions, strict=True))
        weight_dtype, bias_dtype = ctx.dtypes
        grad = grad.contiguous()
        sums = [
            products(grad, x, ctx.groups).to(weight_dtype) if need_weight else None,
            row_sums(grad, ctx.groups).to(bias_dtype) if need_bias else None,
        ]
        taken = deliver(sums, need_parameters, need_companions)
        return (grad @ weight if need_x else None, None, None, *taken)


def products(left: Tensor, right: Tensor, groups: list[slice]) -> Tensor:
    """left^T right over the rows of each group: left [T, N], right [T, K] -> [groups, N, K] in their dtype."""
    if len(groups) == 1:
        return (left.t() @ right)[None]
    out = right.new_empty(len(groups), left.shape[1], right.shape[1])
    for rows, product in zip(groups, out, strict=True):
        torch.mm(left[rows].t(), right[rows], out=product)
    return out


def row_sums(x: Tensor, groups: list[slice]) -> Tensor:
    """The sums over the rows of each group of a contiguous x [T, N]: [groups, N], of at least float32."""
    implementation, _ = dispatch.select("linear", device=x.device.type, dtype=x.dtype)
    if implementation != "cpu":
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.stack([x[rows].sum(0, dtype=wide) for rows in groups])
    out = torch.empty(len(groups), x.shape[1])
    for number, rows in enumerate(groups):
        group = part(x, rows)
        extension.cpu().column_sums(
            x=group.data_ptr(),
            out=out[number].data_ptr(),
            rows=group.shape[0],
            columns=x.shape[1],
            dtype=extension.DTYPE_NAMES[x.dtype],
            threads=torch.get_num_threads(),
        )
    return out
