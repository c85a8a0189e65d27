"""From requested examples to the heads' outputs: through the encoder, packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mtbert.data.packing import Request, Segment, pack
from mtbert.model.dropout import DropoutStream
from mtbert.model.multitask import MultiTaskModel


@dataclass(frozen=True)
class ForwardResult:
    """The heads' outputs of one pass."""

    segments: tuple[Segment, ...]
    outputs: dict[str, Tensor]
    """`[n, outputs]` float32 (float64 for a float64 model) of each task's segment."""
    tokens: int
    """Real tokens that the examples hold."""


class Forward(Protocol):
    """A way to compute outputs; training and inference don't care which."""

    def __call__(self, requests: Sequence[Request], dropout: DropoutStream | None) -> ForwardResult:
        """Outputs of the requested examples; `dropout=None` is inference."""


class PackedForward:
    """All sentences of all tasks in one stream of tokens, one pass of the encoder."""

    def __init__(self, model: MultiTaskModel, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype

    def __call__(self, requests: Sequence[Request], dropout: DropoutStream | None) -> ForwardResult:
        """Pack, move to the device, run the model."""
        batch = pack(requests).to(self.device, non_blocking=True)
        outputs = self.model(batch, dtype=self.dtype, dropout=dropout)
        return ForwardResult(batch.segments, outputs, batch.tokens)
