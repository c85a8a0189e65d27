"""Steps of one shape: filler rows behind each stream's own, so that a step can be captured once and replayed.

A packed batch has as many rows and tokens as its examples happen to have. Here every stream gets a fixed number of
both: its examples, then rows of filler that close its segment. A filler row has no label and weight 0; its hidden
states are computed and read by nobody (see `mtbert.engine.forward.run_model`), so that no finite value that it holds
reaches a loss or a gradient. One that is not finite would reach the gradient, which has its products with 0. So filler
is what its segment holds, again: its embeddings are finite where those of the examples are. The layers above mix them
in other ways than those of the examples. Where a filler row alone overflows there (in fp16), the step counts as one
that overflows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mtbert.data.batching import TaskBatches
from mtbert.data.dataset import TaskData
from mtbert.data.packing import PackedBatch, Request, Segment, pack

_SAMPLES = 256
"""Batches of each task that budgets are measured on."""
_FITTING = 0.99
"""The share of them that a budget is made for: the largest few would have all other steps carry filler for them. Of the
steps of preset minilm on the CS224N tables 1.9% do not fit and 5.7% of the others' tokens are filler; budgets for the
largest of 64 batches in multiples of 64 leave 0.9% out, with 7.8% filler."""
_STEP_TOKENS = 16
_PASS_TOKENS = 64
_WORDS = 256
"""Budgets are multiples of these."""
_LEVELS = 16
"""Sizes between a number of tokens and twice as many that the passes of evaluations are padded to."""


@dataclass(frozen=True)
class StreamShape:
    """The size of one stream's segment, filler included."""

    stream: str
    rows: int
    tokens: int


@dataclass(frozen=True)
class PassShape:
    """All that the shapes of a padded pass depend on."""

    streams: tuple[StreamShape, ...]
    max_seqlen: int


@dataclass(frozen=True)
class StreamBudget:
    """What a step may hold of a stream."""

    examples: int
    tokens: int
    slack: int
    """Tokens between the budget and the smallest full batch that was seen: filler rows must hold them."""


@dataclass(frozen=True)
class Budgets:
    """What a step may hold of each stream, and how many different words in all (0: that is of no matter)."""

    streams: Mapping[str, StreamBudget]
    words: int = 0

    def shape_of(self, batch: PackedBatch) -> PassShape | str:
        """The shape that a packed step is padded to, or why it has none."""
        streams = []
        for segment in batch.segments:
            budget = self.streams.get(segment.stream)
            if budget is None:
                return f"{segment.stream} has no budget"
            if not bool((segment.weights > 0).all()):  # by their weights, examples are told from filler
                return f"{segment.stream} has examples without labels"
            per_example = segment.rows_per_example
            if len(segment.rows) > budget.examples * per_example:
                return f"more examples of {segment.stream} than its budget"
            if len(segment.tokens) > budget.tokens:
                return f"more tokens of {segment.stream} than its budget"
            filler = per_example * -(-budget.slack // (per_example * batch.max_seqlen))
            rows = budget.examples * per_example + filler
            if (rows - len(segment.rows)) * batch.max_seqlen < budget.tokens - len(segment.tokens):
                return f"fewer tokens of {segment.stream} than filler rows can make up for"
            streams.append(StreamShape(segment.stream, rows, budget.tokens))
        return PassShape(tuple(streams), batch.max_seqlen)


def measure_budgets(
    batches: Mapping[str, TaskBatches], data: Mapping[str, TaskData], *, vocabulary: int = 0
) -> Budgets:
    """Budgets that nearly all of the first batches of every task fit into; those of a task have nearly the same number
    of tokens.

    vocabulary: words of the model, where the number of different words in a step of all tasks counts.
    """
    streams = {}
    for task, each in batches.items():
        full = [batch for index in range(_SAMPLES) if len(batch := each.batch(index)) == each.batch_size]
        full = full or [each.batch(0)]
        sums = [int(data[task].lengths[batch].sum()) for batch in full]
        tokens = _rounded(int(np.quantile(sums, _FITTING, method="higher")), _STEP_TOKENS)
        streams[task] = StreamBudget(max(map(len, full)), tokens, tokens - min(sums))
    words = 0
    if vocabulary:
        steps = [
            pack([Request(data[task], each.batch(index), 0, 1.0) for task, each in batches.items()])
            for index in range(_SAMPLES // 16)
        ]
        most = max(len(step.input_ids.unique()) for step in steps)
        words = min(vocabulary, _rounded(most + most // 16, _WORDS))
    return Budgets(streams, words)


def coarse_shape(batch: PackedBatch) -> PassShape:
    """The shape that a pass of an evaluation is padded to, one of few: every batch has one.

    Tokens are rounded up by a sixteenth at most (or to a multiple of 64), the number of examples to a power of two.
    """
    streams = []
    for segment in batch.segments:
        held, per_example = len(segment.tokens), segment.rows_per_example
        tokens = _rounded(held, max(_PASS_TOKENS, (1 << (held.bit_length() - 1)) // _LEVELS))
        rows = len(segment.rows) + -(-(tokens - held) // batch.max_seqlen)  # filler rows hold what is added
        examples = 1 << (-(-rows // per_example) - 1).bit_length()
        streams.append(StreamShape(segment.stream, examples * per_example, tokens))
    return PassShape(tuple(streams), batch.max_seqlen)


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def pad(batch: PackedBatch, shape: PassShape) -> PackedBatch:
    """The batch with filler rows behind the rows of each segment, as many as the shape says.

    The filler's tokens are those of the segment, again and again from its first, each at its own position. Segments
    keep the numbers and ids of their examples; labels and weights get zeros for the examples that filler rows would be.
    ValueError for a batch that does not fit.
    """
    tokens = sum(stream.tokens for stream in shape.streams)
    fields = [np.empty(tokens, dtype=np.int32) for _ in range(4)]
    sources = [
        each.numpy()
        for each in (batch.input_ids, batch.token_type_ids, batch.position_ids, batch.dropout_row)
    ]
    ends = batch.cu_seqlens.numpy()
    lengths, segments = [], []
    first_row = first_token = 0
    for segment, stream in zip(batch.segments, shape.streams, strict=True):
        filler_rows, filler = stream.rows - len(segment.rows), stream.tokens - len(segment.tokens)
        if segment.stream != stream.stream or min(filler_rows, filler) < 0:
            raise ValueError(f"{segment.stream}: {segment.rows}, {segment.tokens} do not fit into {stream}")
        begins = np.arange(filler_rows) * shape.max_seqlen
        filled = np.clip(filler - begins, 0, shape.max_seqlen)
        if int(filled.sum()) < filler:
            raise ValueError(f"{segment.stream}: {filler_rows} filler rows cannot hold {filler} tokens")
        own = ends[segment.rows.start : segment.rows.stop + 1]
        lengths += [np.diff(own), filled]
        for field, source in zip(fields, sources, strict=True):
            held = source[segment.tokens.start : segment.tokens.stop]
            field[first_token : first_token + stream.tokens] = np.resize(held, stream.tokens)
        segments.append(_padded(segment, stream, first_row, first_token))
        first_row, first_token = first_row + stream.rows, first_token + stream.tokens
    bounds = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.concatenate(lengths))])
    ids, types, positions, dropout_row = map(torch.from_numpy, fields)
    return PackedBatch(
        ids,
        types,
        positions,
        dropout_row,
        torch.from_numpy(bounds.astype(np.int32)),
        shape.max_seqlen,
        tuple(segments),
    )


def pad_words(words: Tensor, count: int) -> Tensor:
    """Different words int64 [count]: those given, ascending, then the lowest others. count: at least their number."""
    held = words.numpy()
    others = np.setdiff1d(np.arange(count), held, assume_unique=True)[: count - len(held)]
    return torch.from_numpy(np.concatenate([held, others]))


def _padded(segment: Segment, stream: StreamShape, first_row: int, first_token: int) -> Segment:
    examples = stream.rows // segment.rows_per_example
    labels = segment.labels.new_zeros(examples)
    weights = segment.weights.new_zeros(examples)
    labels[: len(segment.labels)] = segment.labels
    weights[: len(segment.weights)] = segment.weights
    return replace(
        segment,
        rows=range(first_row, first_row + stream.rows),
        tokens=range(first_token, first_token + stream.tokens),
        labels=labels,
        weights=weights,
        padded=True,
    )


def valid_rows(segment: Segment) -> Tensor:
    """bool [rows, 1]: which rows of a padded segment belong to examples."""
    return (segment.weights > 0).unsqueeze(1).expand(-1, segment.rows_per_example).reshape(-1, 1)


def valid_labels(segment: Segment) -> Tensor:
    """The labels [n], and 0 for those that are filler."""
    return torch.where(segment.weights > 0, segment.labels, 0) if segment.padded else segment.labels
