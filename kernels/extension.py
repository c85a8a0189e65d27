"""The compiled extension mtbert._C, when it is there."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from mtbert import installation

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


_cuda_stand_in: Any | None = None


def part(name: str) -> Any | None:
    """The submodule `cpu` or `cuda` of the extension, or None where it was not built."""
    if name == "cuda" and _cuda_stand_in is not None:
        return _cuda_stand_in
    return getattr(_module, name, None)


@contextmanager
def cuda_stand_in(functions: Any) -> Iterator[None]:
    """Within a `with` block, let `functions` stand in for the submodule `cuda`, on tensors in host memory.

    For an emulation of a GPU; it serves with kernels=cuda, as Triton's interpreter does with kernels=triton.
    """
    global _cuda_stand_in
    before, _cuda_stand_in = _cuda_stand_in, functions
    try:
        yield
    finally:
        _cuda_stand_in = before


def architectures() -> list[str]:
    """What the submodule `cuda` was built for: sm_80, sm_90a, compute_90; empty where it was not built."""
    return [] if _module is None else list(_architectures(_module))


@functools.cache
def _architectures(module: ModuleType) -> tuple[str, ...]:
    built = module.build_info()["cuda"]
    return () if built is None else tuple(built["architectures"])


def cuda_is_emulated() -> bool:
    """Whether something stands in for the submodule `cuda`."""
    return _cuda_stand_in is not None


# What follows does not change while a program runs, and torch.compile need not look into it.


@torch.compiler.assume_constant_result
def tf32_is_allowed() -> bool:
    """Whether PyTorch's matrix products on a GPU may round float32 to TF32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU; None for another device, and where PyTorch sees no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


@torch.compiler.assume_constant_result
def has_code_for(gpu: tuple[int, int]) -> bool:
    """Whether the extension was built for GPUs of a compute capability."""
    return any(installation.runs_on(target, *gpu) for target in architectures())


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
