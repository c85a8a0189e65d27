"""A frozen encoder's features, computed once: later epochs train the heads in a moment."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mtbert.data.dataset import MAX_POSITIONS, TaskData
from mtbert.data.packing import Request, make_segment, pack, plan_passes
from mtbert.data.padding import Budgets
from mtbert.engine.forward import ForwardResult, PackedForward, PassInput, SegmentsOf
from mtbert.kernels.casts import WeightCasts
from mtbert.model.dropout import DropoutStream
from mtbert.model.multitask import MultiTaskModel
from mtbert.ranges import span

if TYPE_CHECKING:
    from mtbert.engine.shared import SharedParts


class FrozenForward:
    """Like the packed forward, but the encoder reads every table only once; heads read its features from memory.

    Only for mode `last-linear-layer`: the encoder is frozen and drops nothing, so that its features are constants.
    Memory: rows x width x 4 bytes a table, on the device.
    """

    def __init__(self, packed: PackedForward, *, max_tokens: int, shared: SharedParts | None = None) -> None:
        """shared: where other runs of this process find the features, and this one finds theirs."""
        if packed.model.mode != "last-linear-layer":
            raise ValueError(
                f"features are constant only in mode last-linear-layer, not in {packed.model.mode}"
            )
        self.packed = packed
        self.model: MultiTaskModel = packed.model
        self.device = packed.device
        self.dtype = packed.dtype
        self.max_tokens = max_tokens
        self.shared = shared
        self._cache: weakref.WeakKeyDictionary[TaskData, Tensor] = weakref.WeakKeyDictionary()

    def prepare(self, requests: Sequence[Request], budgets: Budgets | None = None) -> PassInput:
        """Nothing but the requests: the features are on the device."""
        tokens = sum(int(request.data.lengths[request.examples].sum()) for request in requests)
        return PassInput(tuple(requests), tokens, unfit="" if budgets is None else "the features are cached")

    def __call__(self, requests: Sequence[Request], dropout: DropoutStream | None) -> ForwardResult:
        """`run` what is prepared."""
        return self.run(self.prepare(requests), dropout)

    def run(
        self, ready: PassInput, dropout: DropoutStream | None, segments: SegmentsOf | None = None
    ) -> ForwardResult:
        """Gather the examples' features, run the heads; `tokens` counts what the features stand for.

        No trained parameter is shared here, so that `segments` has nothing to tell apart.
        """
        device = self.device
        found, features, dropout_rows = [], {}, {}
        with span("data"):
            for request in ready.requests:
                data = request.data
                each = data.rows_per_example
                rows = (request.examples[:, None] * each + np.arange(each)).reshape(-1)
                features[data.name] = self.features(data)[torch.from_numpy(rows).to(device)]
                row_ids = torch.arange(request.first_row_id, request.first_row_id + len(rows), device=device)
                dropout_rows[data.name] = (row_ids * MAX_POSITIONS).to(torch.int32)
                segment = make_segment(request)
                found.append(
                    replace(segment, labels=segment.labels.to(device), weights=segment.weights.to(device))
                )
        with span("forward"):
            outputs = self.packed.model.outputs_from_features(
                features, dropout_rows=dropout_rows, dropout=dropout
            )
        return ForwardResult(tuple(found), features, outputs, ready.tokens)

    def features(self, data: TaskData) -> Tensor:
        """Pooled rows `[rows, C]` of a whole table on the device; computed at the first call."""
        cached = self._cache.get(data)
        if cached is None:
            shared = self.shared
            cached = self._compute(data) if shared is None else shared.features(self, data, self._compute)
            self._cache[data] = cached
        return cached

    # Evaluation runs in inference mode, whose tensors a later training step could not use.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _compute(self, data: TaskData) -> Tensor:
        model = self.packed.model
        order = np.argsort(-data.lengths, kind="stable")
        each = data.rows_per_example
        result: Tensor | None = None
        with WeightCasts():
            for requests in plan_passes({data.name: order}, {data.name: data}, self.max_tokens):
                batch = pack(requests).to(self.packed.device)
                rows = model.features(batch, dtype=self.packed.dtype)[data.name]
                if result is None:
                    result = rows.new_empty(len(data) * each, rows.shape[1])
                examples = torch.from_numpy(requests[0].examples).to(result.device)
                result.view(len(data), each, -1)[examples] = rows.view(len(examples), each, -1)
        assert result is not None
        return result
