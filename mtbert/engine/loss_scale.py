"""The dynamic loss scale of fp16 (Micikevicius et al. 2018, section 3.2), on the device.

Gradients of float16 activations underflow below 6e-8, so the loss is multiplied by a scale before the backward pass
and the gradients are divided by it afterwards, in float32, before anything else reads them. A scale that is too large
makes gradients overflow: then the step is skipped and the scale halved. After 2,000 good steps in a row it is doubled.
These are the rules of `torch.amp.GradScaler`. Everything is a tensor on the device, changed in place and never read by
the host within a step, so that a CUDA graph can hold the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

INITIAL = 2.0**16
GROWTH = 2.0
BACKOFF = 0.5
GROWTH_INTERVAL = 2000
MOST_SKIPPED = 20
"""Skipped steps in a row that end a run: by then the scale has fallen by a factor of a million."""


@dataclass(frozen=True)
class Scaling:
    """What became of one step under a loss scale; tensors of its own on the device."""

    scale: Tensor
    """What the step's loss was multiplied by, 0-d float32."""
    skipped: Tensor
    """Steps in a row, this one included, that were skipped; 0-d int32, 0 where this one was not."""


class LossScaler:
    """The scale, and what decides its next value."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INITIAL, dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)
        """Since the scale last changed."""
        self.skipped = torch.zeros((), dtype=torch.int32, device=device)
        """In a row, until now."""

    def scaled(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses that the backward pass starts from."""
        return {name: loss * self.scale for name, loss in losses.items()}

    @torch.no_grad()
    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divide gradients by the scale, in place; exact, because the scale is a power of two."""
        if gradients:
            torch._foreach_mul_(list(gradients), self.scale.reciprocal())

    def unscaled(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The same as new tensors, for gradients that may share memory."""
        inverse = self.scale.reciprocal()
        return [None if gradient is None else gradient * inverse for gradient in gradients]

    @torch.no_grad()
    def report(self, finite: Tensor) -> Scaling:
        """What becomes of a step, given whether its loss and gradient are finite (0-d bool)."""
        return Scaling(self.scale.clone(), (self.skipped + 1) * ~finite)

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Choose the scale of the next step, given whether this one was finite."""
        self.skipped.add_(1).mul_(~finite)
        self.good_steps.add_(1).mul_(finite)
        grows = self.good_steps >= GROWTH_INTERVAL
        wanted = self.scale * torch.where(finite, torch.where(grows, GROWTH, 1.0), BACKOFF)
        self.scale.copy_(torch.where(torch.isfinite(wanted), wanted, self.scale))
        self.good_steps.mul_(~grows)

    def state(self) -> dict[str, Tensor]:
        """What must be found again after a resumption, by name."""
        return {"scale": self.scale, "good_steps": self.good_steps, "skipped": self.skipped}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state of `state()`. Raises KeyError for a state of another precision."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
