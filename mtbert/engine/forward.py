"""From requested examples to the heads' outputs: through the encoder, packed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mtbert.data.packing import PackedBatch, Request, Segment, pack
from mtbert.data.padding import Budgets, PassShape, pad, valid_rows
from mtbert.engine.distributed import ALONE, World
from mtbert.kernels.segments import Segments
from mtbert.losses.objective import Again
from mtbert.model.dropout import DropoutStream
from mtbert.model.multitask import MultiTaskModel
from mtbert.ranges import span

if TYPE_CHECKING:
    from mtbert.engine.inference_graphs import InferenceGraphs


@dataclass(frozen=True)
class PassInput:
    """What a forward pass reads, on the host: all that can be made ready before the device is free."""

    requests: tuple[Request, ...]
    tokens: int
    """Real tokens that the examples hold."""
    batch: PackedBatch | None = None
    """The packed rows, in page-locked memory where a GPU will read them; None when the encoder is not run."""
    shape: PassShape | None = None
    """What the batch is padded to."""
    unfit: str = ""
    """Why it is not padded, where that was asked for."""


SegmentsOf = Callable[[PackedBatch], Segments | None]
"""Where the gradients of a batch's tasks go, when they are wanted one by one."""


@dataclass(frozen=True)
class ForwardResult:
    """The heads' outputs of one pass."""

    segments: tuple[Segment, ...]
    rows: Mapping[str, Tensor]
    """Pooled rows `[rows, C]` of each stream."""
    outputs: Mapping[str, Tensor]
    """`[n, outputs]` float32 (float64 for a float64 model) of each task's segment."""
    tokens: int
    """Real tokens that the examples hold."""
    batch: PackedBatch | None = None
    """What the encoder read; None when its features were there already, or when a graph has read its buffers."""


NOTHING = ForwardResult((), {}, {}, 0)
"""Of a rank whose share of a pass is empty."""


class Forward(Protocol):
    """A way to compute outputs; training and inference don't care which."""

    @property
    def model(self) -> MultiTaskModel:
        """The model that computes."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def dtype(self) -> torch.dtype:
        """What the encoder computes in."""

    def prepare(self, requests: Sequence[Request], budgets: Budgets | None = None) -> PassInput:
        """The host's part of a pass. Another thread may do it: it touches nothing that a pass changes.

        budgets: pad the pass to them, if it fits.
        """

    def run(
        self, ready: PassInput, dropout: DropoutStream | None, segments: SegmentsOf | None = None
    ) -> ForwardResult:
        """The device's part: outputs of the requested examples; `dropout=None` is inference."""

    def __call__(self, requests: Sequence[Request], dropout: DropoutStream | None) -> ForwardResult:
        """Both parts, one after the other."""


class PackedForward:
    """All sentences of all tasks in one stream of tokens, one pass of the encoder."""

    def __init__(self, model: MultiTaskModel, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        self.graphs: InferenceGraphs | None = None
        """Serve the passes of evaluations and predictions, where a run captures them."""

    def prepare(self, requests: Sequence[Request], budgets: Budgets | None = None) -> PassInput:
        """Pack, and pad where that is asked for."""
        batch, shape, unfit = self.pack(requests), None, ""
        tokens = batch.tokens
        if budgets is not None:
            found = budgets.shape_of(batch)
            if isinstance(found, str):
                unfit = found
            else:
                batch, shape = pad(batch, found), found
        batch = batch.pinned() if self.device.type == "cuda" else batch
        return PassInput(tuple(requests), tokens, batch, shape, unfit)

    def __call__(self, requests: Sequence[Request], dropout: DropoutStream | None) -> ForwardResult:
        """Pack, and run the model; without dropout or gradients by a captured graph, where there is one."""
        if self.graphs is not None and dropout is None and not torch.is_grad_enabled():
            return self.graphs.run(requests)
        with span("data"):
            ready = self.prepare(requests)
        return self.run(ready, dropout)

    def run(
        self, ready: PassInput, dropout: DropoutStream | None, segments: SegmentsOf | None = None
    ) -> ForwardResult:
        """Move to the device, run the model."""
        assert ready.batch is not None
        with span("data"):
            batch = ready.batch.to(self.device, non_blocking=True)
        with span("forward"):
            rows, outputs = run_model(self.model, batch, self.dtype, dropout, segments)
        return ForwardResult(batch.segments, rows, outputs, ready.tokens, batch)

    def pack(self, requests: Sequence[Request]) -> PackedBatch:
        """What the encoder reads, on the host."""
        return pack(requests)


def run_model(
    model: MultiTaskModel,
    batch: PackedBatch,
    dtype: torch.dtype,
    dropout: DropoutStream | None,
    segments: SegmentsOf | None = None,
    noise: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Pooled rows and outputs of every stream of `batch`.

    What the batch holds of the encoder's first layers serves where it is of `dtype` and there is no noise beneath it.
    """
    serves = noise is None and batch.below is not None and batch.below.hidden.dtype == dtype
    rows = model.features(
        batch,
        dtype=dtype,
        dropout=dropout,
        segments=segments(batch) if segments else None,
        noise=noise,
        below=batch.below if serves else None,
    )
    for segment in batch.segments:
        if (
            segment.padded
        ):  # selected, not multiplied: what filler rows hold must not even be NaN for the heads
            rows[segment.stream] = torch.where(valid_rows(segment), rows[segment.stream], 0.0)
    return rows, model.outputs_from_features(
        rows, dropout_rows=model.dropout_rows(batch) if dropout else None, dropout=dropout
    )


class TrainingPass:
    """One forward pass of a training step, as the objectives see it."""

    def __init__(
        self,
        forward: Forward,
        result: ForwardResult,
        *,
        dropout: DropoutStream,
        segments: SegmentsOf | None,
        examples: Mapping[str, np.ndarray],
        step: int,
        progress: float,
        shares: Sequence[Sequence[Request]],
        world: World = ALONE,
    ) -> None:
        """shares: what each rank of `world` reads in this pass, `result` being this rank's."""
        self.segments = result.segments
        self.examples = examples
        self.rows = result.rows
        self.outputs = result.outputs
        self.step = step
        self.progress = progress
        self._forward = forward
        self._batch = result.batch
        self._dropout = dropout
        self._segments_of = segments
        self._world = world
        self._shares = shares
        self._by_stream = {segment.stream: segment for segment in result.segments}

    def segment(self, stream: str) -> Segment | None:
        """The segment of a stream; None when this pass holds none of it."""
        return self._by_stream.get(stream)

    def examples_by_rank(self, stream: str) -> list[np.ndarray]:
        """The examples of a stream that each rank has in this pass, int64 [n]."""
        none = np.zeros(0, dtype=np.int64)
        return [next((r.examples for r in share if r.data.name == stream), none) for share in self._shares]

    def rows_of_all_ranks(self, own: Tensor | None, counts: Sequence[int], texts: int) -> Tensor:
        """Embeddings [sum(counts), texts, C] of all ranks; see `mtbert.losses.objective.Pass`."""
        if own is None:
            model = self._forward.model
            own = next(model.parameters()).new_zeros(0, texts, model.encoder.config.hidden_size)
        return self._world.joined_rows(own, counts)

    def sub_batch(self, streams: Sequence[str]) -> PackedBatch:
        """The packed rows of those streams alone, in the order of the pass."""
        if self._batch is None:
            raise ValueError("a frozen encoder's features were not packed: there is no batch to read again")
        return self._batch.subset(streams)

    def fresh_dropout(self) -> DropoutStream:
        """Masks that no other forward pass of this step has."""
        self._dropout = replace(self._dropout, forward_pass=self._dropout.forward_pass + 1)
        return self._dropout

    def again(
        self,
        streams: Sequence[str],
        *,
        dropout: DropoutStream | None,
        noise: Tensor | None = None,
        trained: bool = True,
        model: MultiTaskModel | None = None,
        dtype: torch.dtype | None = None,
    ) -> Again:
        """One more forward pass over `sub_batch(streams)`; see `mtbert.losses.objective.Pass`."""
        batch = self.sub_batch(streams)
        chosen = self._forward.model if model is None else model
        own = trained and model is None
        with span("forward"), contextlib.nullcontext() if trained else _untrained(chosen):
            rows, outputs = run_model(
                chosen,
                batch,
                self._forward.dtype if dtype is None else dtype,
                dropout,
                self._segments_of if own else None,
                noise,
            )
        return Again(batch, rows, outputs)


@contextlib.contextmanager
def _untrained(model: nn.Module) -> Iterator[None]:
    """No parameter of `model` takes part in the graphs that are built within."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
