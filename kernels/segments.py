"""Gradients of several groups of tokens from one backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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

    _on_device: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        bounds = self.bounds
        if len(bounds) < 2 or bounds[0] != 0 or any(high < low for low, high in pairwise(bounds)):
            raise ValueError(f"Segments: bounds must ascend from 0, found {bounds}")

    @property
    def count(self) -> int:
        """K."""
        return len(self.bounds) - 1

    def bounds_on(self, device: torch.device) -> Tensor:
        """The bounds as an int32 tensor [K + 1] on `device`: copied once a stream, whatever the number of operations.

        A graph cannot hold the copy: bounds that it uses are made before the capture, by this function or by an
        operation, and the segments kept as long as it is replayed. Raises RuntimeError where there are none.
        """
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            made = [bounds for (place, _), bounds in self._on_device.items() if place == device]
            if not made:
                raise RuntimeError(
                    f"Segments: the bounds are not on {device}, and a graph is being captured, which cannot hold their"
                    " copy; call bounds_on(device) before the capture"
                )
            return made[0]
        # The copy is ordered with the work of one stream, and its memory goes back to that one.
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        if (device, stream) not in self._on_device:
            self._on_device[device, stream] = _copied(self.bounds, device)
        return self._on_device[device, stream]

    def ranges(self) -> list[slice]:
        """The tokens of each group."""
        return [slice(low, high) for low, high in pairwise(self.bounds)]


def _copied(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    made = torch.tensor(bounds, dtype=torch.int32)
    # From pageable memory the copy would wait for all that the stream has still to do.
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made


def companion(parameter: Tensor, groups: int) -> Tensor:
    """A leaf `[groups, *shape]` for the group gradients of `parameter`. It takes no memory until it has a gradient."""
    zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
    return zero.expand(groups, *parameter.shape).requires_grad_()
