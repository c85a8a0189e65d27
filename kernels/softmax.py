"""Softmax over the leading columns of each row, with dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from mtbert.ranges import operation

from . import dispatch, reference
from .checks import check_dropout, check_tensor
from .philox import Dropout


@operation("softmax")
def softmax(
    x: Tensor,
    *,
    lengths: Tensor | None = None,
    dropout_row: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """dropout(softmax(x[m, : lengths[m]])) of every row m, zeros beyond.

    x: [M, C], contiguous; lengths: int32 [M], each 0 to C (None: C everywhere); a row of length 0 is all zeros. What
    stands beyond a row's length, NaN too, reaches no output and no gradient. dropout_row: int32 [M], the mask's row;
    its columns are 0 to C - 1. Sums in float32. Returns [M, C] in the dtype of x. Raises ValueError naming the argument
    that does not fit.
    """
    check_tensor("softmax", "x", x, (None, None))
    if lengths is not None:
        check_tensor("softmax", "lengths", lengths, (x.shape[0],), dtypes=(torch.int32,), device=x.device)
    active = check_dropout("softmax", dropout_row, dropout, x)
    rows = None if active is None else dropout_row
    implementation, _ = dispatch.select("softmax", device=x.device.type, dtype=x.dtype)
    if implementation == "triton":
        from .triton_ops.softmax import softmax as fused

        return fused(x, lengths, rows, active)
    return reference.softmax(x, lengths=lengths, dropout_row=rows, dropout=active)
