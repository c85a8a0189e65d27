"""Argument checks that the public functions share: each failure is a ValueError naming operation and argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .philox import Dropout

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def fail(operation: str, argument: str, expected: str, found: Any) -> None:
    """Raise ValueError: `operation: argument must be expected, got found`."""
    raise ValueError(f"{operation}: {argument} must be {expected}, got {found}")


def check_tensor(
    operation: str,
    argument: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    *,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    device: torch.device | None = None,
) -> None:
    """Check kind, shape (None: any size), dtype, device and contiguity of one tensor."""
    if not isinstance(tensor, Tensor):
        fail(operation, argument, "a tensor", type(tensor).__name__)
    if tensor.ndim != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        fail(operation, argument, f"of shape [{wanted}]", f"shape {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        fail(operation, argument, "of dtype " + " or ".join(_short(d) for d in dtypes), _short(tensor.dtype))
    if device is not None and tensor.device != device:
        fail(operation, argument, f"on device {device}", f"device {tensor.device}")
    if not tensor.is_contiguous():
        fail(operation, argument, "contiguous", f"strides {list(tensor.stride())}")


def check_parameter(
    operation: str, argument: str, tensor: Tensor, shape: tuple[int | None, ...], like: Tensor
) -> None:
    """Check a parameter: its shape and device, and a floating dtype that may differ from the activations'."""
    check_tensor(operation, argument, tensor, shape, device=like.device)


def check_dropout(
    operation: str, dropout_row: Tensor | None, dropout: Dropout | None, like: Tensor
) -> Dropout | None:
    """Check the rows of a mask against the first dimension of `like`; returns None where nothing is dropped."""
    if dropout is None or dropout.threshold == 0:
        return None
    if dropout_row is None:
        fail(operation, "dropout_row", "given when dropout is", "None")
    else:
        check_tensor(
            operation, "dropout_row", dropout_row, (like.shape[0],), dtypes=(torch.int32,), device=like.device
        )
    if isinstance(dropout.step, Tensor) and dropout.step.device != like.device:
        fail(operation, "dropout.step", f"on device {like.device}", f"device {dropout.step.device}")
    return dropout


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
