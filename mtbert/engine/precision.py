"""The compute type of a run: float32, or bfloat16 activations over float32 master weights."""

from __future__ import annotations

from typing import Literal

import torch

from mtbert.engine.distributed import ALONE, World
from mtbert.errors import ConfigError

Precision = Literal["auto", "float32", "bf16"]


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices natively (AVX512-BF16 or AMX; sm_80 and newer)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of activations and matrix products; `auto` takes bfloat16 where the hardware has it.

    Master weights, LayerNorm statistics, softmax, heads, losses and the optimizer stay in float32.
    """
    if precision == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(f"precision: {torch.cuda.get_device_name(device)} has no bfloat16; use float32")
    return torch.bfloat16 if precision == "bf16" else torch.float32


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
