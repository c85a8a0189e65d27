"""Dropout by the stateless mask: a pure function of row, column and `Dropout`, the same in every implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtbert.ranges import operation

from . import dispatch, extension, reference
from .checks import check_dropout, check_tensor
from .philox import Dropout

__all__ = ["Dropout", "apply_mask", "dropout"]


@operation("dropout")
def dropout(x: Tensor, dropout_row: Tensor, dropout: Dropout | None) -> Tensor:
    """Set dropped elements to zero, whatever they hold, and scale the kept ones.

    x: [T, C], contiguous; dropout_row: int32 [T]; dropout: None or p = 0 returns x itself. Returns [T, C] in the dtype
    of x. Raises ValueError naming the argument that does not fit.
    """
    check_tensor("dropout", "x", x, (None, None))
    active = check_dropout("dropout", dropout_row, dropout, x)
    if active is None:
        return x
    return _Dropout.apply(x, dropout_row, active)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout_row: Tensor, dropout: Dropout) -> Tensor:
        ctx.save_for_backward(dropout_row)
        ctx.dropout = dropout
        return apply_mask(x, dropout_row, dropout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (dropout_row,) = ctx.saved_tensors
        return apply_mask(grad.contiguous(), dropout_row, ctx.dropout), None, None


def apply_mask(x: Tensor, dropout_row: Tensor, dropout: Dropout) -> Tensor:
    """The masked and scaled copy of a contiguous x [T, C], outside autograd; forward and backward are both this."""
    implementation, _ = dispatch.select("dropout", device=x.device.type, dtype=x.dtype)
    if implementation == "reference":
        return reference.dropout(x, dropout_row, dropout)
    if implementation == "triton":
        from .triton_ops.dropout import dropout as fused

        return fused(x, dropout_row, dropout)
    out = torch.empty_like(x)
    if implementation == "cpu":
        extension.cpu().dropout(
            x=x.data_ptr(),
            out=out.data_ptr(),
            rows=x.shape[0],
            columns=x.shape[1],
            dtype=extension.DTYPE_NAMES[x.dtype],
            threads=torch.get_num_threads(),
            **extension.dropout_arguments(dropout_row, dropout),
        )
        return out
    cuda = extension.part("cuda")
    assert cuda is not None
    cuda.dropout(
        input=x.data_ptr(),
        output=out.data_ptr(),
        rows=x.shape[0],
        columns=x.shape[1],
        input_stride=x.shape[1],
        output_stride=x.shape[1],
        dtype=extension.DTYPE_NAMES[x.dtype],
        device=x.device.index,
        stream=torch.cuda.current_stream(x.device).cuda_stream,
        **extension.dropout_arguments(dropout_row, dropout),
    )
    return out
