"""The compiled extension mtbert._C, when it is there."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from .philox import Dropout

_module: ModuleType | None
try:
    from mtbert import _C as _module  # type: ignore[attr-defined,no-redef,unused-ignore]

    problem = ""
except ImportError as error:
    _module = None
    problem = f"the extension mtbert._C is not built ({error})"
"""Why there is no extension, or ''."""

DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
"""What the extension calls the dtypes."""


def part(name: str) -> Any | None:
    """The submodule `cpu` or `cuda` of the extension, or None where it was not built."""
    return getattr(_module, name, None)


def cpu() -> Any:
    """The submodule `cpu`; only for a call that dispatch has given to it."""
    assert _module is not None
    return _module.cpu


def instruction_set() -> str | None:
    """The vector instructions that the C++ kernels use; None where they were not built."""
    functions = part("cpu")
    return None if functions is None else functions.instruction_set()


def dropout_arguments(dropout_row: torch.Tensor | None, dropout: Dropout | None) -> dict[str, int]:
    """The arguments by which every function of the extension takes its mask; a row pointer of 0 means none."""
    if dropout is None or dropout_row is None:
        return {"dropout_row": 0, "seed": 0, "step": 0, "site": 0, "threshold": 0}
    return {
        "dropout_row": dropout_row.data_ptr(),
        "seed": dropout.seed,
        "step": int(dropout.step),
        "site": dropout.site,
        "threshold": dropout.threshold,
    }


def pointer(tensor: torch.Tensor | None) -> int:
    """A tensor's address; 0 stands for an absent one."""
    return 0 if tensor is None else tensor.data_ptr()
