"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from mtbert.errors import ConfigError

_RATIO = 32


@dataclass
class ScheduleConfig:
    """Warm-up, then the shape of the decay."""

    shape: Literal["linear", "cosine", "constant", "slanted-triangular"] = "linear"
    """How the learning rate falls after the warm-up: linearly to 0, as a half cosine to 0, or not at all;
    slanted-triangular (Howard and Ruder 2018) rises from and falls to 1/32 of the peak."""
    warmup: float = 0.1
    """Linear warm-up: a share of all steps below 1, a number of steps from 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < float("inf"):
            raise ConfigError(f"schedule.warmup: expected at least 0, found {self.warmup}")


def factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """The share of the peak learning rate at `step` (0-based) of `total_steps`.

    slanted-triangular: (1 + 31 p) / 32 with cut = floor(warm-up steps), p = step / cut below cut and
    1 - (step - cut) / (total_steps - cut) from there on (Howard and Ruder 2018, equation 3, with ratio 32; cut_frac is
    `warmup`).
    """
    warmup = config.warmup if config.warmup >= 1 else config.warmup * total_steps
    if config.shape == "slanted-triangular":
        cut = min(math.floor(warmup), total_steps)
        p = step / cut if step < cut else 1.0 - min(1.0, (step - cut) / max(1, total_steps - cut))
        return (1.0 + p * (_RATIO - 1)) / _RATIO
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.shape == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1.0, total_steps - warmup))
    return 1.0 - progress if config.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> float:
    """Give every group `share` of its own peak; returns the largest, for the log."""
    rates = [group["peak_lr"] * share for group in optimizer.param_groups]
    moved: torch.Tensor | None = getattr(optimizer, "moved_learning_rates", None)
    if moved is None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    else:  # a new tensor each time: the device may not have read the one before
        made = torch.tensor(rates, dtype=moved.dtype)
        moved.copy_(made.pin_memory() if moved.is_cuda else made, non_blocking=True)
    return max(rates)


def move_learning_rates(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Have the optimizer read its learning rates from one tensor [groups] float32 on the device.

    `set_learning_rate` writes them there with one copy, where a captured step reads them.
    """
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    moved = torch.tensor(rates, dtype=torch.float32, device=device)
    for place, group in enumerate(optimizer.param_groups):
        group["lr"] = moved[place]
    optimizer.moved_learning_rates = moved  # type: ignore[attr-defined]
