"""The matrix product with a weight, in the activations' dtype."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch, extension, reference
from .checks import check_parameter, check_tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias.

    x: [T, K], contiguous; weight: [N, K]; bias: [N] or None; parameters of any floating dtype: they are cast to that of
    x (free where they have it already), and their gradients come back in theirs; none is computed for a frozen one.
    Returns [T, N] in the dtype of x. Raises ValueError naming the argument that does not fit.
    """
    check_product("linear", x, weight, bias)
    implementation, _ = dispatch.select("linear", device=x.device.type, dtype=x.dtype)
    if implementation == "reference":
        return reference.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def check_product(operation: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check the arguments that every product takes."""
    check_tensor(operation, "x", x, (None, None))
    check_parameter(operation, "weight", weight, (None, x.shape[1]), x)
    if bias is not None:
        check_parameter(operation, "bias", bias, (weight.shape[0],), x)


class _Linear(torch.autograd.Function):
    """Keeps the cast weight for the input's gradient, and x only where the weight is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        need_x, need_weight, _ = ctx.needs_input_grad
        cast_weight = weight.to(x.dtype)
        ctx.save_for_backward(x if need_weight else None, cast_weight if need_x else None)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return F.linear(x, cast_weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        return (
            grad @ weight if need_x else None,
            (grad.t() @ x).to(ctx.dtypes[0]) if need_weight else None,
            bias_gradient(grad, ctx.dtypes[1]) if need_bias else None,
        )


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over tokens of a contiguous grad [T, N], accumulated in at least float32."""
    implementation, _ = dispatch.select("linear", device=grad.device.type, dtype=grad.dtype)
    if implementation == "cpu":
        out = torch.empty(grad.shape[1])
        extension.cpu().column_sums(
            x=grad.data_ptr(),
            out=out.data_ptr(),
            rows=grad.shape[0],
            columns=grad.shape[1],
            dtype=extension.DTYPE_NAMES[grad.dtype],
            threads=torch.get_num_threads(),
        )
        return out.to(dtype)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return grad.sum(0, dtype=wide).to(dtype)
