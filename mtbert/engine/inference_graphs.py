"""Passes of evaluations and predictions captured in CUDA graphs, as `mtbert.engine.graphs` captures steps.

The passes of a table hold as many rows and tokens as their examples happen to have. They are padded to a few shapes,
and come again at every evaluation, since the same examples make the same passes. The weights change in between, but lie
where they did; those that lie elsewhere (a parameter was replaced) are in no graph, and all graphs are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtbert.data.packing import PackedBatch, Request
from mtbert.data.padding import coarse_shape, pad
from mtbert.engine.capture import Captures, Recorder, Work
from mtbert.engine.forward import ForwardResult, PassInput, run_model
from mtbert.kernels.casts import WeightCasts

if TYPE_CHECKING:
    from mtbert.engine.forward import PackedForward

WARM_UP = 1
MOST = 64
"""Shapes that are captured at most, of all tasks together; they share the memory of their large tensors."""


class InferenceGraphs(Captures[PassInput, ForwardResult]):
    """The captured passes of a model without dropout, by task and shape."""

    def __init__(
        self, forward: PackedForward, recorder: Recorder, *, most: int = MOST, warm_up: int = WARM_UP
    ) -> None:
        super().__init__(recorder, most=most, warm_up=warm_up)
        self.forward = forward
        self._addresses: list[int] = []

    # Buffers that one evaluation made must serve the next one: all are tensors of this mode.
    @torch.inference_mode()
    def run(self, requests: Sequence[Request]) -> ForwardResult:
        """Outputs and pooled rows of the requested examples, without dropout."""
        addresses = [tensor.data_ptr() for tensor in _weights(self.forward)]
        if addresses != self._addresses:
            self.forget()
            self._addresses = addresses
        ready = self._prepared(requests)
        result = self._attempt(ready.shape, lambda: _Pass(self.forward, ready), ready)
        return self.forward.run(self.forward.prepare(requests), None) if result is None else result

    def _prepared(self, requests: Sequence[Request]) -> PassInput:
        """The pass with filler. No labels are read; all examples have weight 1, which tells them from filler."""
        packed = self.forward.pack(requests)
        segments = [
            replace(
                segment,
                labels=torch.zeros(len(segment.examples), dtype=torch.int64),
                weights=torch.ones(len(segment.examples), dtype=torch.float64),
            )
            for segment in packed.segments
        ]
        shape = coarse_shape(packed)
        batch = pad(replace(packed, segments=tuple(segments)), shape)
        batch = batch.pinned() if self.forward.device.type == "cuda" else batch
        return PassInput(tuple(requests), packed.tokens, batch, shape)


class _Pass(Work[PassInput, ForwardResult]):
    """The pass of one shape."""

    def __init__(self, forward: PackedForward, ready: PassInput) -> None:
        super().__init__(f"a pass of {', '.join(request.data.name for request in ready.requests)}")
        self._forward = forward
        self._buffers = _batch_of(ready).mapped(lambda each: torch.empty_like(each, device=forward.device))
        self._form: tuple[dict[str, torch.Size], dict[str, torch.Size]] = ({}, {})
        """Shapes of the pooled rows and of the outputs, by stream."""

    def load(self, given: PassInput) -> None:
        """Put a pass's input into the buffers."""
        for target, source in zip(_tensors(self._buffers), _tensors(_batch_of(given)), strict=True):
            target.copy_(source, non_blocking=True)

    def compute(self) -> Tensor:
        """Run the model.

        Casts that an evaluation keeps are gone, or of other values, when the graph is replayed: it makes its own.
        """
        with WeightCasts():
            found = run_model(self._forward.model, self._buffers, self._forward.dtype, None)
        rows, outputs = ({name: tensor.shape for name, tensor in each.items()} for each in found)
        self._form = rows, outputs
        return torch.cat([tensor.reshape(-1) for each in found for tensor in each.values()])

    def result(self, flat: Tensor, given: PassInput) -> ForwardResult:
        """Rows and outputs of the examples alone."""
        rows, outputs = self._form
        rest = iter(flat.split([shape.numel() for form in self._form for shape in form.values()]))
        segments = _batch_of(given).segments
        examples = {segment.stream: len(segment.examples) for segment in segments}
        per_example = {segment.stream: segment.rows_per_example for segment in segments}
        return ForwardResult(
            segments,
            {n: next(rest).view(shape)[: examples[n] * per_example[n]] for n, shape in rows.items()},
            {name: next(rest).view(shape)[: examples[name]] for name, shape in outputs.items()},
            given.tokens,
        )


def _batch_of(ready: PassInput) -> PackedBatch:
    assert ready.batch is not None
    return ready.batch


def _tensors(batch: PackedBatch) -> list[Tensor]:
    found: list[Tensor] = []
    batch.mapped(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def _weights(forward: PackedForward) -> Iterator[Tensor]:
    yield from forward.model.parameters()
    yield from forward.model.buffers()
