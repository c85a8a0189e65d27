"""What one pass through the encoder works on: the packed tokens, whose they are, and what is dropped or told apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from mtbert import kernels
from mtbert.kernels.segments import Segments
from mtbert.model.checkpointing import Recipes
from mtbert.model.dropout import DropoutStream


class PackedTokens(Protocol):
    """What the encoder reads of a packed batch; tensors are int32 and on the encoder's device."""

    @property
    def input_ids(self) -> Tensor:
        """[T] vocabulary ids."""

    @property
    def token_type_ids(self) -> Tensor:
        """[T] 0 in the first text of a row, 1 in the second."""

    @property
    def position_ids(self) -> Tensor:
        """[T] place of the token in its row, below max_position_embeddings."""

    @property
    def dropout_row(self) -> Tensor:
        """[T] row id * 4096 + position."""

    @property
    def cu_seqlens(self) -> Tensor:
        """[N + 1] row n is tokens cu_seqlens[n] : cu_seqlens[n + 1]."""

    @property
    def max_seqlen(self) -> int:
        """At least the length of the longest row."""


class TaskSegment(Protocol):
    """The part of a packed batch that belongs to one stream of rows."""

    @property
    def stream(self) -> str:
        """Name of the stream, unique in a batch: that of the task, or of rows that an objective adds to it."""

    @property
    def task(self) -> str:
        """The task that it belongs to."""

    @property
    def rows(self) -> range:
        """Its rows."""

    @property
    def tokens(self) -> range:
        """The tokens of its rows."""


class TaskBatch(PackedTokens, Protocol):
    """What the model reads of a packed batch."""

    @property
    def segments(self) -> Sequence[TaskSegment]:
        """One a stream, in the order of their rows; together they hold every token."""


class LayersBelow(Protocol):
    """What the encoder's first layers give for the tokens of a batch, where that was computed before."""

    @property
    def hidden(self) -> Tensor:
        """[T, C], in the dtype that the encoder computes in."""

    @property
    def layers(self) -> int:
        """How many layers that is, above the embeddings."""


@dataclass(frozen=True)
class ForwardContext:
    """What every layer needs to know of one pass through the encoder."""

    batch: PackedTokens
    dtype: torch.dtype
    """What the encoder computes in."""
    dropout: DropoutStream | None = None
    """None drops nothing."""
    segments: Segments | None = None
    """With it, shared parameters get one gradient for each group of tokens."""
    recipes: Recipes | None = None
    """Gradient checkpointing of cheap operations."""

    def cheap(self, operation: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
        """operation(*arguments, **options), whose result may be computed again in the backward pass to save memory."""
        if self.recipes is None:
            return operation(*arguments, **options)
        return self.recipes.cheap(operation, *arguments, **options)

    def mask(self, p: float, site: int) -> kernels.Dropout | None:
        """The dropout at `site`."""
        return self.dropout.at(p, site) if self.dropout else None

    @cached_property
    def task_tokens(self) -> list[tuple[str, slice]]:
        """The tokens as stretches of one task each, in their order. The batch must have segments that hold them all."""
        found: list[tuple[str, slice]] = []
        end = 0
        for segment in cast(TaskBatch, self.batch).segments:
            start, stop = segment.tokens.start, segment.tokens.stop
            if start != end:
                raise ValueError(f"segment {segment.stream} starts at token {start}, expected {end}")
            if found and found[-1][0] == segment.task:
                found[-1] = (segment.task, slice(found[-1][1].start, stop))
            elif start < stop:
                found.append((segment.task, slice(start, stop)))
            end = stop
        if end != self.batch.input_ids.shape[0]:
            raise ValueError(f"the segments end at token {end} of {self.batch.input_ids.shape[0]}")
        return found

    def by_task(self, call: Callable[[str, slice], Tensor]) -> Tensor:
        """`call(task, tokens)` for every stretch of `task_tokens`, end to end: [T, ...]."""
        parts = [call(task, tokens) for task, tokens in self.task_tokens]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
