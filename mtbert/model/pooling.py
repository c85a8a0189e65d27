"""From the hidden states of a packed batch to one vector a row, for the rows of some of its segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from mtbert.kernels.segments import Segments
from mtbert.model.bert import BertEncoder
from mtbert.model.context import PackedTokens, TaskSegment
from mtbert.model.first_tokens import first_tokens, segments_in_rows
from mtbert.ranges import operation

Pooling = Literal["cls", "pooler", "mean"]
POOLINGS: tuple[str, ...] = get_args(Pooling)
FIRST_TOKEN_POOLINGS: tuple[str, ...] = ("cls", "pooler")
"""Those that read a row's first token and no other."""


@operation("pooling")
def pool(
    pooling: str,
    encoder: BertEncoder,
    hidden: Tensor,
    batch: PackedTokens,
    chosen: Sequence[TaskSegment],
    segments: Segments | None = None,
) -> Tensor:
    """The rows of the chosen segments, end to end: [rows, C] of hidden states [T, C], in at least float32.

    segments: as in the encoder's forward pass, for the parameters of BERT's pooler.
    """
    return _POOLS[pooling](encoder, hidden, batch, chosen, segments)


def part(x: Tensor, places: range) -> Tensor:
    """A stretch of x (a view)."""
    return x[places.start : places.stop]


def _pool_cls(
    encoder: BertEncoder,
    hidden: Tensor,
    batch: PackedTokens,
    chosen: Sequence[TaskSegment],
    segments: Segments | None,
) -> Tensor:
    return _widen(_first_rows(hidden, batch, chosen))


def _pool_pooler(
    encoder: BertEncoder,
    hidden: Tensor,
    batch: PackedTokens,
    chosen: Sequence[TaskSegment],
    segments: Segments | None,
) -> Tensor:
    in_rows = None if segments is None else segments_in_rows(segments, chosen)
    return _widen(encoder.pool_first(_first_rows(hidden, batch, chosen), in_rows))


def _pool_mean(
    encoder: BertEncoder,
    hidden: Tensor,
    batch: PackedTokens,
    chosen: Sequence[TaskSegment],
    segments: Segments | None,
) -> Tensor:
    lengths = _parts(batch.cu_seqlens.diff(), [segment.rows for segment in chosen]).long()
    tokens = _widen(_parts(hidden, [segment.tokens for segment in chosen]))
    # Deterministic on every device, unlike index_add; `unsafe` skips a check that would wait for the device.
    sums = torch.segment_reduce(tokens, "sum", lengths=lengths, axis=0, unsafe=True)
    return sums / lengths.clamp(min=1).unsqueeze(1)


_Pool = Callable[[BertEncoder, Tensor, PackedTokens, Sequence[TaskSegment], Segments | None], Tensor]
_POOLS: dict[str, _Pool] = {"cls": _pool_cls, "pooler": _pool_pooler, "mean": _pool_mean}


def _first_rows(hidden: Tensor, batch: PackedTokens, chosen: Sequence[TaskSegment]) -> Tensor:
    return hidden.index_select(0, _parts(first_tokens(batch), [segment.rows for segment in chosen]))


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _parts(x: Tensor, places: Sequence[range]) -> Tensor:
    """The given stretches of x, end to end; x itself (no copy) when they are all of it."""
    joined = [places[0]]
    for stretch in places[1:]:
        if stretch.start == joined[-1].stop:
            joined[-1] = range(joined[-1].start, stretch.stop)
        else:
            joined.append(stretch)
    return part(x, joined[0]) if len(joined) == 1 else torch.cat([part(x, stretch) for stretch in joined])
