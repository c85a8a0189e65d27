"""The first tokens of a packed batch as a batch of their own: what a last layer computes where nothing else is read.

Where every row is pooled by its first token, the last layer's queries, attention output, feed-forward part and
LayerNorms are needed at the first tokens alone; keys and values at all tokens. Everything that works on tokens takes
such a batch like any other, one token a row: its masks are those of the full computation, as `dropout_row` goes along.
"""

from __future__ import annotations

from collections.abc import Sequence
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
class RowSegment:
    """A stream's segment among first tokens: its tokens are numbered as its rows."""

    stream: str
    task: str
    rows: range

    @property
    def tokens(self) -> range:
        """One a row."""
        return self.rows


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
    def segments(self) -> tuple[RowSegment, ...]:
        """Those of `whole`."""
        return tuple(RowSegment(s.stream, s.task, s.rows) for s in self.whole.segments)


def first_token_context(context: ForwardContext) -> tuple[ForwardContext, FirstTokens]:
    """The same pass at the first tokens alone: the same masks, and the segments' bounds in rows.

    The batch of `context` must be a `TaskBatch` whose segments hold every row.
    """
    whole = cast(TaskBatch, context.batch)
    first = FirstTokens(whole)
    segments = None if context.segments is None else segments_in_rows(context.segments, whole.segments)
    return replace(context, batch=first, segments=segments), first


def segments_in_rows(segments: Segments, chosen: Sequence[TaskSegment]) -> Segments:
    """The same groups with bounds in the rows of the chosen segments, which stand end to end.

    ValueError where a segment's tokens lie in no single group. (One without tokens, whose rows get no gradient, counts
    to the group before it.)
    """
    counts = [0] * segments.count
    group = 0
    for segment in chosen:
        while group < segments.count and segment.tokens.stop > segments.bounds[group + 1]:
            group += 1
        if group == segments.count or segment.tokens.start < segments.bounds[group]:
            raise ValueError(
                f"segment {segment.stream} is in no single group of tokens: {segment.tokens} of {segments.bounds}"
            )
        counts[group] += len(segment.rows)
    return Segments((0, *accumulate(counts)), segments.companions)
