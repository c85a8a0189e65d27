"""Gradients of several groups of tokens from one backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Where the tokens of each of K groups (tasks) lie, and where their parts of the weight gradients go.

    Rows of a packed batch are independent, so the gradient that group k gives a weight W of y = x W^T is the sum
    over its own tokens, dW_k = dy[range_k]^T x[range_k]. An operation that is given segments returns these K
    gradients, stacked, as the gradient of the weight's companion: a leaf `[K, *shape]` that takes no part in the
    forward computation. The companions are inputs of the operation, so that autograd accumulates over passes, and
    `torch.autograd.grad` with respect to other tensors leaves them alone.
    """

    bounds: tuple[int, ...]
    """K + 1 ascending offsets on the host: group k is tokens (rows of x) bounds[k] : bounds[k + 1], maybe none."""
    companions: Mapping[Tensor, Tensor]
    """The companion of each parameter that has one. Other parameters get their usual gradient."""
    slots: Tensor | None = None
    """int32 [tokens]: with it, the companion of the embedding's word table is `[K, slots in use, C]`, and row
    slots[t] of it belongs to the word of token t. A dense table would be almost all zeros."""

    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        bounds = self.bounds
        if len(bounds) < 2 or bounds[0] != 0 or any(high < low for low, high in pairwise(bounds)):
            raise ValueError(f"Segments: bounds must ascend from 0, found {bounds}")

    @property
    def count(self) -> int:
        """K."""
        return len(self.bounds) - 1

    def bounds_on(self, device: torch.device) -> Tensor:
        """The bounds as an int32 tensor [K + 1] on `device`: made once, whatever the number of operations."""
        if device not in self._on_device:
            # Filled, not copied from the host: a copy could not be captured in a graph.
            bounds = torch.empty(len(self.bounds), dtype=torch.int32, device=device)
            for place, bound in zip(bounds, self.bounds, strict=True):
                place.fill_(bound)
            self._on_device[device] = bounds
        return self._on_device[device]

    def with_parts(self, whole: Tensor, parts: Sequence[Tensor]) -> Segments:
        """These segments, for operations that take stretches of the rows of parameter `whole` in its place.

        parts: the stretches, which together are all of its rows in their order. Where `whole` has a companion, each
        gets its part of it; gradients arrive at the companion of `whole`.
        """
        if whole not in self.companions:
            return self
        pieces = self.companions[whole].split([len(part) for part in parts], dim=1)
        changed = replace(self, companions={**self.companions, **dict(zip(parts, pieces, strict=True))})
        changed._on_device.update(self._on_device)
        return changed

    def ranges(self) -> list[slice]:
        """The tokens of each group."""
        return [slice(low, high) for low, high in pairwise(self.bounds)]


def companion(parameter: Tensor, groups: int) -> Tensor:
    """A leaf `[groups, *shape]` for the group gradients of `parameter`. It takes no memory until it has a gradient."""
    zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
    return zero.expand(groups, *parameter.shape).requires_grad_()
