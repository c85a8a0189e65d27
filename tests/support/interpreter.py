"""Triton's interpreter, made to round to bfloat16 as a GPU does, and to count in older versions with a new NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np


def prepare() -> None:
    """Mend what the tests need; does nothing where the interpreter is not in use."""
    _round_to_nearest()
    _count_by_one_element()


def _round_to_nearest() -> None:
    """Let the interpreter round float32 to the nearest bfloat16, ties to even; of itself it cuts off.

    A kernel's error is judged against that of PyTorch, which rounds; cutting off doubles the error.
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


def _count_by_one_element() -> None:
    """Let `range(tensor)` work: before 3.9 the interpreter calls int() on an array [1], which NumPy 2.4 refuses."""
    import triton
    from triton.runtime import interpreter

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9):
        return
    patch: Any = interpreter._patch_lang_tensor
    if hasattr(patch, "as_published"):
        return

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        # Triton 3.6 undoes what was set by way of a scope, 3.4 never does.
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: int(np.squeeze(self.handle.data)))

    patched.as_published = patch  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched
