"""Bias and exact GELU in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch, extension, reference
from .checks import check_parameter, check_tensor


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """z Phi(z) with z = x + bias and the exact normal distribution function, not its tanh form.

    x: [T, F], contiguous; bias: [F], of any floating dtype (its gradient comes back in it, none for a frozen one).
    Returns [T, F] in the dtype of x. Raises ValueError naming the argument that does not fit.
    """
    check_tensor("bias_gelu", "x", x, (None, None))
    check_parameter("bias_gelu", "bias", bias, (x.shape[1],), x)
    implementation, _ = dispatch.select("bias_gelu", device=x.device.type, dtype=x.dtype)
    if implementation == "cpu":
        return _BiasGeluCpu.apply(x, bias)
    return reference.bias_gelu(x, bias)


class _BiasGeluCpu(torch.autograd.Function):
    """Saves what stands before the bias, and computes the rest again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        out = torch.empty_like(x)
        bias32 = bias.float()
        extension.cpu().bias_gelu_forward(out=out.data_ptr(), **_arguments(x, bias32))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, bias = ctx.saved_tensors
        grad = grad.contiguous()
        need_x, need_bias = ctx.needs_input_grad
        dx = torch.empty_like(x) if need_x else None
        dbias = torch.empty(x.shape[1]) if need_bias else None
        bias32 = bias.float()
        extension.cpu().bias_gelu_backward(
            dout=grad.data_ptr(),
            dx=extension.pointer(dx),
            dbias=extension.pointer(dbias),
            **_arguments(x, bias32),
        )
        return dx, None if dbias is None else dbias.to(bias.dtype)


def _arguments(x: Tensor, bias: Tensor) -> dict[str, Any]:
    return {
        "x": x.data_ptr(),
        "bias": bias.data_ptr(),
        "rows": x.shape[0],
        "columns": x.shape[1],
        "dtype": extension.DTYPE_NAMES[x.dtype],
        "threads": torch.get_num_threads(),
    }
