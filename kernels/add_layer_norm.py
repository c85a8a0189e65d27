"""The end of a sub-layer in one pass: bias, dropout, residual connection and LayerNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch, extension, reference
from .checks import check_dropout, check_parameter, check_tensor
from .philox import Dropout


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
) -> Tensor:
    """LayerNorm(residual + dropout(x + linear_bias)), statistics in float32 (Ba et al. 2016).

    x, residual: [T, C], contiguous, of one dtype; weight, bias, linear_bias: [C], of any floating dtype (gradients come
    back in theirs, and none is computed for a frozen one); linear_bias is that of the product which made x. Returns
    [T, C] in the dtype of x. Raises ValueError naming the argument that does not fit.
    """
    name = "add_layer_norm"
    check_tensor(name, "x", x, (None, None))
    check_tensor(name, "residual", residual, tuple(x.shape), dtypes=(x.dtype,), device=x.device)
    check_parameter(name, "weight", weight, (x.shape[1],), x)
    check_parameter(name, "bias", bias, (x.shape[1],), x)
    if linear_bias is not None:
        check_parameter(name, "linear_bias", linear_bias, (x.shape[1],), x)
    active = check_dropout(name, dropout_row, dropout, x)
    implementation, _ = dispatch.select(name, device=x.device.type, dtype=x.dtype)
    if implementation == "cpu":
        rows = None if active is None else dropout_row
        return _AddLayerNormCpu.apply(x, residual, weight, bias, linear_bias, eps, rows, active)
    return reference.add_layer_norm(
        x, residual, weight, bias, linear_bias=linear_bias, eps=eps, dropout_row=dropout_row, dropout=active
    )


class _AddLayerNormCpu(torch.autograd.Function):
    """Saves x and residual, which the neighbouring products keep anyway, and two numbers a row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        linear_bias: Tensor | None,
        eps: float,
        dropout_row: Tensor | None,
        dropout: Dropout | None,
    ) -> Tensor:
        out = torch.empty_like(x)
        mean, rstd = torch.empty(2, x.shape[0])
        weight32 = weight.float()
        bias32 = bias.float()
        linear_bias32 = None if linear_bias is None else linear_bias.float()
        extension.cpu().add_layer_norm_forward(
            bias=bias32.data_ptr(),
            out=out.data_ptr(),
            eps=eps,
            **_arguments(x, residual, weight32, linear_bias32, mean, rstd, dropout_row, dropout),
        )
        ctx.save_for_backward(x, residual, weight, linear_bias, mean, rstd, dropout_row)
        ctx.dropout = dropout
        ctx.bias_dtype = bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, weight, linear_bias, mean, rstd, dropout_row = ctx.saved_tensors
        need_x, need_residual, need_weight, need_bias, need_linear_bias, *_ = ctx.needs_input_grad
        grad = grad.contiguous()
        dx = torch.empty_like(x) if need_x else None
        dresidual = torch.empty_like(residual) if need_residual else None
        dweight, dbias, dlinear_bias = (
            torch.empty(x.shape[1]) if need else None for need in (need_weight, need_bias, need_linear_bias)
        )
        weight32 = weight.float()
        linear_bias32 = None if linear_bias is None else linear_bias.float()
        extension.cpu().add_layer_norm_backward(
            dout=grad.data_ptr(),
            dx=extension.pointer(dx),
            dresidual=extension.pointer(dresidual),
            dweight=extension.pointer(dweight),
            dbias=extension.pointer(dbias),
            dlinear_bias=extension.pointer(dlinear_bias),
            **_arguments(x, residual, weight32, linear_bias32, mean, rstd, dropout_row, ctx.dropout),
        )
        return (
            dx,
            dresidual,
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None else dbias.to(ctx.bias_dtype),
            None if dlinear_bias is None else dlinear_bias.to(linear_bias.dtype),
            None,
            None,
            None,
        )


def _arguments(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    linear_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_row: Tensor | None,
    dropout: Dropout | None,
) -> dict[str, Any]:
    return {
        "x": x.data_ptr(),
        "residual": residual.data_ptr(),
        "linear_bias": extension.pointer(linear_bias),
        "weight": weight.data_ptr(),
        "mean": mean.data_ptr(),
        "rstd": rstd.data_ptr(),
        "rows": x.shape[0],
        "columns": x.shape[1],
        "dtype": extension.DTYPE_NAMES[x.dtype],
        "threads": torch.get_num_threads(),
        **extension.dropout_arguments(dropout_row, dropout),
    }
