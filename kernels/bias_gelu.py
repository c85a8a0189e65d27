"""Bias and exact GELU in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtbert.ranges import operation

from . import dispatch, extension, reference
from .checks import check_parameter, check_tensor
from .grouped import deliver, part, row, split
from .segments import Segments


@operation("bias_gelu")
def bias_gelu(x: Tensor, bias: Tensor, *, segments: Segments | None = None) -> Tensor:
    """z Phi(z) with z = x + bias and the exact normal distribution function, not its tanh form.

    x: [T, F], contiguous; bias: [F], of any floating dtype (its gradient comes back in it, none for a frozen one).
    segments: groups of the T rows; the bias's companion gets one gradient a group instead of the bias. Returns [T, F]
    in the dtype of x. Raises ValueError naming the argument that does not fit.
    """
    check_tensor("bias_gelu", "x", x, (None, None))
    check_parameter("bias_gelu", "bias", bias, (x.shape[1],), x)
    groups, parameters, companions = split("bias_gelu", segments, x.shape[0], {"bias": bias})
    implementation, _ = dispatch.select("bias_gelu", device=x.device.type, dtype=x.dtype)
    if implementation == "cpu":
        return _BiasGeluCpu.apply(x, groups, *parameters, *companions)
    if implementation == "triton":
        from .triton_ops.bias_gelu import bias_gelu as fused

        bounds = None if segments is None or len(groups) == 1 else segments.bounds_on(x.device)
        return fused(x, parameters, companions, bounds, len(groups))
    return reference.bias_gelu(x, bias, segments=segments)


class _BiasGeluCpu(torch.autograd.Function):
    """Saves what stands before the bias, and computes the rest again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: list[slice], bias: Tensor, companion: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.groups = groups
        out = torch.empty_like(x)
        bias32 = bias.float()
        extension.cpu().bias_gelu_forward(out=out.data_ptr(), **_arguments(x, bias32))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        groups = ctx.groups
        need_x, _, need_bias, need_companion = ctx.needs_input_grad
        grad = grad.contiguous()
        dx = torch.empty_like(x) if need_x else None
        dbias = torch.empty(len(groups), x.shape[1]) if need_bias or need_companion else None
        bias32 = bias.float()
        for number, rows in enumerate(groups):
            extension.cpu().bias_gelu_backward(
                dout=part(grad, rows).data_ptr(),
                dx=extension.pointer(part(dx, rows)),
                dbias=extension.pointer(row(dbias, number)),
                **_arguments(part(x, rows), bias32),
            )
        sums = [None if dbias is None else dbias.to(bias.dtype)]
        return dx, None, *deliver(sums, [need_bias], [need_companion])


def _arguments(x: Tensor, bias: Tensor) -> dict[str, Any]:
    return {
        "x": x.data_ptr(),
        "bias": bias.data_ptr(),
        "rows": x.shape[0],
        "columns": x.shape[1],
        "dtype": extension.DTYPE_NAMES[x.dtype],
        "threads": torch.get_num_threads(),
    }
