"""The first tokens of a packed batch as a batch of their own: what a last layer computes where nothing else is read.

Where a row is pooled by its first token, the last layer's queries, attention output, feed-forward part and LayerNorms
are needed at that token alone; keys and values at all of its tokens. Everything that works on tokens takes such a batch
like any other, one token a row: its masks are those of the full computation, as `dropout_row` goes along. Rows are
independent, so that streams of a batch can be told apart before the last layer and go through it by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from mtbert.kernels.segments import Segments
from mtbert.model.context import ForwardContext, PackedTokens, TaskBatch, TaskSegment


def first_tokens(batch: PackedTokens) -> Tensor:
    """Place of each row's first token, int32 [N]. A row without tokens points to some token of the stream."""
    return batch.cu_seqlens[:-1].clamp(max=batch.input_ids.shape[0] - 1)


@dataclass(frozen=True)
class PartSegment:
    """A stream's segment among first tokens, or in a part of a batch."""

    stream: str
    task: str
    rows: range
    tokens: range


def _end_to_end(chosen: Sequence[TaskSegment], size: Callable[[TaskSegment], int]) -> tuple[PartSegment, ...]:
    """The chosen segments in a batch that holds no others; size: how many tokens one has there."""
    rows = [0, *accumulate(len(segment.rows) for segment in chosen)]
    tokens = [0, *accumulate(map(size, chosen))]
    return tuple(
        PartSegment(s.stream, s.task, range(*rows[n : n + 2]), range(*tokens[n : n + 2]))
        for n, s in enumerate(chosen)
    )


def _row_count(segment: TaskSegment) -> int:
    return len(segment.rows)


def _token_count(segment: TaskSegment) -> int:
    return len(segment.tokens)


@dataclass(frozen=True)
class FirstTokens:
    """A `TaskBatch` of N tokens, the first of each row of `whole`."""

    whole: TaskBatch

    @cached_property
    def places(self) -> Tensor:
        """Where they are in `whole`, int32 [N]."""
        return first_tokens(self.whole)

    @property
    def input_ids(self) -> Tensor:
        """[N]."""
        return self.whole.input_ids.index_select(0, self.places)

    @property
    def token_type_ids(self) -> Tensor:
        """[N]."""
        return self.whole.token_type_ids.index_select(0, self.places)

    @property
    def position_ids(self) -> Tensor:
        """[N]."""
        return self.whole.position_ids.index_select(0, self.places)

    @cached_property
    def dropout_row(self) -> Tensor:
        """[N]."""
        return self.whole.dropout_row.index_select(0, self.places)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[N + 1]: every row has one token."""
        bounds = self.whole.cu_seqlens
        return torch.arange(bounds.shape[0], dtype=bounds.dtype, device=bounds.device)

    @property
    def max_seqlen(self) -> int:
        """1."""
        return 1

    @cached_property
    def segments(self) -> tuple[PartSegment, ...]:
        """Those of `whole`; a segment's tokens are numbered as its rows."""
        return _end_to_end(self.whole.segments, _row_count)


@dataclass(frozen=True)
class Part:
    """A `TaskBatch` of some segments of `whole`, end to end."""

    whole: TaskBatch
    chosen: tuple[TaskSegment, ...]

    def take(self, x: Tensor) -> Tensor:
        """What belongs to the part's tokens: [T, ...] -> [tokens of the part, ...]."""
        return self._of_chosen(x, _token_count)

    def _of_chosen(self, x: Tensor, size: Callable[[TaskSegment], int]) -> Tensor:
        # The gradient of one split is written once; that of slices would be a sum of tensors as large as x.
        pieces = x.split([size(segment) for segment in self.whole.segments])
        streams = {segment.stream for segment in self.chosen}
        return torch.cat(
            [piece for piece, s in zip(pieces, self.whole.segments, strict=True) if s.stream in streams]
        )

    @cached_property
    def input_ids(self) -> Tensor:
        """[T]."""
        return self.take(self.whole.input_ids)

    @cached_property
    def token_type_ids(self) -> Tensor:
        """[T]."""
        return self.take(self.whole.token_type_ids)

    @cached_property
    def position_ids(self) -> Tensor:
        """[T]."""
        return self.take(self.whole.position_ids)

    @cached_property
    def dropout_row(self) -> Tensor:
        """[T]."""
        return self.take(self.whole.dropout_row)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[N + 1]."""
        lengths = self._of_chosen(self.whole.cu_seqlens.diff(), _row_count)
        ends = lengths.cumsum(0, dtype=lengths.dtype)
        return torch.cat((ends.new_zeros(1), ends))

    @property
    def max_seqlen(self) -> int:
        """That of `whole`."""
        return self.whole.max_seqlen

    @cached_property
    def segments(self) -> tuple[PartSegment, ...]:
        """The chosen ones."""
        return _end_to_end(self.chosen, _token_count)


def first_token_context(context: ForwardContext) -> ForwardContext:
    """The same pass at the first tokens alone: the same masks, and the segments' bounds in rows.

    The batch of `context` must be a `TaskBatch` whose segments hold every row; that of the result is `FirstTokens`.
    """
    whole = cast(TaskBatch, context.batch)
    segments = None if context.segments is None else segments_in_rows(context.segments, whole.segments)
    return replace(context, batch=FirstTokens(whole), segments=segments)


def by_stream(
    context: ForwardContext, hidden: Tensor, streams: Collection[str]
) -> tuple[tuple[ForwardContext, Tensor] | None, tuple[ForwardContext, Tensor] | None]:
    """The pass and the hidden states [T, C] of `streams`, and those of all other streams; None where there are none.

    All count as others where only some of them are asked for, and these or the others have no tokens. The batch of
    `context` must be a `TaskBatch` whose segments hold every row and every token.
    """
    whole = cast(TaskBatch, context.batch)
    inside, outside = (
        tuple(segment for segment in whole.segments if (segment.stream in streams) == wanted)
        for wanted in (True, False)
    )
    if not outside:
        return (context, hidden), None
    if not all(any(segment.tokens for segment in side) for side in (inside, outside)):
        return None, (context, hidden)

    def part(chosen: tuple[TaskSegment, ...]) -> tuple[ForwardContext, Tensor]:
        batch = Part(whole, chosen)
        segments = None if context.segments is None else _regrouped(context.segments, chosen, _token_count)
        return replace(context, batch=batch, segments=segments), batch.take(hidden)

    return part(inside), part(outside)


def segments_in_rows(segments: Segments, chosen: Sequence[TaskSegment]) -> Segments:
    """The same groups with bounds in the rows of the chosen segments, which stand end to end.

    ValueError where a segment's tokens lie in no single group. (One without tokens, whose rows get no gradient, counts
    to the group before it.)
    """
    return _regrouped(segments, chosen, _row_count)


def _regrouped(
    segments: Segments, chosen: Sequence[TaskSegment], size: Callable[[TaskSegment], int]
) -> Segments:
    counts = [0] * segments.count
    group = 0
    for segment in chosen:
        while group < segments.count and segment.tokens.stop > segments.bounds[group + 1]:
            group += 1
        if group == segments.count or segment.tokens.start < segments.bounds[group]:
            raise ValueError(
                f"segment {segment.stream} is in no single group of tokens: {segment.tokens} of {segments.bounds}"
            )
        counts[group] += size(segment)
    return Segments((0, *accumulate(counts)), segments.companions)
