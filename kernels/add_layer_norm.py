"""The end of a sub-layer in one pass: bias, dropout, residual connection and LayerNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtbert.ranges import operation

from . import dispatch, extension, reference
from .checks import check_dropout, check_parameter, check_tensor
from .grouped import deliver, part, row, split
from .philox import Dropout
from .segments import Segments


@operation("add_layer_norm")
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
    """LayerNorm(residual + dropout(x + linear_bias)), statistics in float32 (Ba et al. 2016).

    x, residual: [T, C], contiguous, of one dtype; weight, bias, linear_bias: [C], of any floating dtype (gradients come
    back in theirs, and none is computed for a frozen one); linear_bias is that of the product which made x.
    segments: groups of the T rows; a parameter's companion gets one gradient a group instead of the parameter. Returns
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
    groups, parameters, companions = split(
        name, segments, x.shape[0], {"weight": weight, "bias": bias, "linear_bias": linear_bias}
    )
    implementation, _ = dispatch.select(name, device=x.device.type, dtype=x.dtype, width=x.shape[1])
    rows = None if active is None else dropout_row
    if implementation == "cpu":
        return _AddLayerNormCpu.apply(x, residual, eps, rows, active, groups, *parameters, *companions)
    if implementation == "triton":
        from .triton_ops.add_layer_norm import add_layer_norm as fused

        bounds = None if segments is None or len(groups) == 1 else segments.bounds_on(x.device)
        return fused(x, residual, parameters, companions, eps, rows, active, bounds, len(groups))
    return reference.add_layer_norm(
        x,
        residual,
        weight,
        bias,
        linear_bias=linear_bias,
        eps=eps,
        dropout_row=dropout_row,
        dropout=active,
        segments=segments,
    )


class _AddLayerNormCpu(torch.autograd.Function):
    """Saves x and residual, which the neighbouring products keep anyway, and two numbers a row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        eps: float,
        dropout_row: Tensor | None,
        dropout: Dropout | None,
        groups: list[slice],
        weight: Tensor,
        bias: Tensor,
        linear_bias: Tensor | None,
        *companions: Tensor | None,
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
        ctx.dropout, ctx.groups = dropout, groups
        ctx.dtypes = [weight.dtype, bias.dtype, None if linear_bias is None else linear_bias.dtype]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, weight, linear_bias, mean, rstd, dropout_row = ctx.saved_tensors
        groups = ctx.groups
        need_x, need_residual = ctx.needs_input_grad[:2]
        need_parameters, need_companions = ctx.needs_input_grad[6:9], ctx.needs_input_grad[9:]
        grad = grad.contiguous()
        dx = torch.empty_like(x) if need_x else None
        dresidual = torch.empty_like(residual) if need_residual else None
        sums = [
            torch.empty(len(groups), x.shape[1]) if any(needs) else None
            for needs in zip(need_parameters, need_companions, strict=True)
        ]
        dweight, dbias, dlinear_bias = sums
        weight32 = weight.float()
        linear_bias32 = None if linear_bias is None else linear_bias.float()
        for number, rows in enumerate(groups):
            extension.cpu().add_layer_norm_backward(
                dout=part(grad, rows).data_ptr(),
                dx=extension.pointer(part(dx, rows)),
                dresidual=extension.pointer(part(dresidual, rows)),
                dweight=extension.pointer(row(dweight, number)),
                dbias=extension.pointer(row(dbias, number)),
                dlinear_bias=extension.pointer(row(dlinear_bias, number)),
                **_arguments(
                    part(x, rows),
                    part(residual, rows),
                    weight32,
                    linear_bias32,
                    part(mean, rows),
                    part(rstd, rows),
                    part(dropout_row, rows),
                    ctx.dropout,
                ),
            )
        sums = [None if s is None else s.to(dtype) for s, dtype in zip(sums, ctx.dtypes, strict=True)]
        return dx, dresidual, None, None, None, None, *deliver(sums, need_parameters, need_companions)


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
