"""The precision of a run: what is multiplied in which type. Master weights, statistics and sums are float32 in each.

    precision   activations   products of the encoder   float32 products (heads, losses)   loss scale
    float32     float32       float32                   float32                            none
    tf32        float32       TF32                      TF32                               none
    bf16        bfloat16      bfloat16                  float32                            none
    fp16        float16       float16                   float32                            dynamic

Whatever the precision, these are float32: parameters and their gradients as the optimizer sees them, the optimizer's
moments, LayerNorm's and softmax's statistics, pooling's sums, heads, losses, the sum over passes, gradient surgery.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from mtbert.engine.distributed import ALONE, World
from mtbert.errors import ConfigError

Precision = Literal["auto", "float32", "tf32", "bf16", "fp16"]

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""What the encoder's activations are."""


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices natively (AVX512-BF16 or AMX; sm_80 and newer)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def has_tf32(device: torch.device) -> bool:
    """Whether the hardware rounds float32 to TF32 in its matrix products: GPUs of compute capability 8.0 or newer.

    PyTorch 2.13 also takes `torch.backends.mkldnn.matmul.fp32_precision = "tf32"`, but oneDNN then multiplies in
    float32, to the same error, unless the processor has AMX-TF32.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """The precision without `auto`, which is bf16 where the hardware multiplies it natively, else float32.

    Raises ConfigError for what the device cannot do.
    """
    if precision == "auto":
        return "bf16" if has_fast_bf16(device) else "float32"
    if precision == "tf32" and not has_tf32(device):
        if device.type == "cuda":
            found = f"{torch.cuda.get_device_name(device)} is older"
        else:
            found = f"the device is {device.type}, where float32 products stay float32"
        native = "bf16 or float32" if has_fast_bf16(device) else "float32"
        raise ConfigError(
            f"precision: tf32 needs a GPU of compute capability 8.0 or newer, but {found}; possible: {native}"
        )
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            f"precision: {torch.cuda.get_device_name(device)} has no bfloat16; possible: fp16 or float32"
        )
    return precision


def precision_elsewhere(precision: Precision, device: torch.device) -> Precision:
    """What a model trained with `precision` computes in on another device: TF32 is less precise float32."""
    return "float32" if precision == "tf32" and not has_tf32(device) else precision


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of the encoder's activations. Raises ConfigError for what the device cannot do."""
    return DTYPES[resolve_precision(precision, device)]


@contextmanager
def product_settings(precision: Precision) -> Iterator[None]:
    """Within it, PyTorch multiplies float32 matrices as TF32 for `tf32`, else as float32; afterwards, as before.

    So `float32` means float32 whatever the process was set to. For `fp16` the parts of a float16 product are added up
    in float32, since they may overflow where their sum does not.
    """
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    narrow_sums = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # PyTorch refuses to sum up settings that were made one by one
        legacy = "highest"
    try:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        if precision == "fp16":
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        yield
    finally:
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = narrow_sums
        torch.set_float32_matmul_precision(legacy)
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def resolve_device(name: str, world: World = ALONE) -> torch.device:
    """`auto` is the first GPU, else the CPU; anything else must be a device that torch can use here.

    Of several ranks each takes the GPU with its number on its machine, whichever GPU is named.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] == "cuda" and world.size > 1:
        if world.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"device: {name} gives each rank of a machine a GPU of its own, but torchrun started"
                f" {world.local_size} ranks here and there are {torch.cuda.device_count()} GPUs; possible: cpu, or"
                " fewer ranks"
            )
        name = f"cuda:{world.local_rank}"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device: {name!r} cannot be used here ({reason}); use auto or cpu") from error
    return device
