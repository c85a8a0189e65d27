"""Triton's interpreter, made to round to bfloat16 as a GPU does."""

from __future__ import annotations

from typing import Any

import numpy as np


def round_to_nearest() -> None:
    """Let the interpreter round float32 to the nearest bfloat16, ties to even; of itself it cuts off.

    A kernel's error is judged against that of PyTorch, which rounds; cutting off doubles the error. Does nothing where
    the interpreter is not in use.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    if hasattr(builder, "cast_as_published"):
        return
    builder.cast_as_published = builder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return self.cast_as_published(source, target)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        not_a_number = ((bits >> 16) | 0x40).astype(np.uint16)
        data = np.where(np.isnan(source.data), not_a_number, rounded)
        return interpreter.TensorHandle(data.reshape(source.data.shape), target.scalar)

    builder.cast_impl = cast
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, lambda self, source, target: self.cast_impl(source, target))
