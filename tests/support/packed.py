"""Packed batches made by hand: random tokens, without tables or a tokeniser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_POSITIONS = 4096


@dataclass(frozen=True)
class Part:
    """A stream's rows and tokens in a batch."""

    stream: str
    task: str
    rows: range
    tokens: range


@dataclass(frozen=True)
class Packed:
    """What the model reads of a packed batch."""

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    dropout_row: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    segments: tuple[Part, ...]

    @property
    def lengths(self) -> list[int]:
        return self.cu_seqlens.diff().tolist()


def random_batch(
    tasks: Mapping[str, Sequence[int]], vocabulary: int, *, seed: int = 0, types: int = 2
) -> Packed:
    """Random tokens in rows of the given lengths, task after task (or stream, `task/name`); row n has row id n."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [length for rows in tasks.values() for length in rows]
    total = sum(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])
    row_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    parts, row, token = [], 0, 0
    for stream, rows in tasks.items():
        task = stream.partition("/")[0]
        parts.append(Part(stream, task, range(row, row + len(rows)), range(token, token + sum(rows))))
        row, token = row + len(rows), token + sum(rows)
    return Packed(
        input_ids=torch.randint(vocabulary, (total,), generator=generator, dtype=torch.int32),
        token_type_ids=torch.randint(types, (total,), generator=generator, dtype=torch.int32),
        position_ids=positions.int(),
        dropout_row=(row_ids * MAX_POSITIONS + positions).int(),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(32, max(lengths)),
        segments=tuple(parts),
    )


def padded(batch: Packed, values: Tensor) -> Tensor:
    """[T, ...] -> [N, L, ...], zeros in the padding."""
    return torch.nn.utils.rnn.pad_sequence(list(values.split(batch.lengths)), batch_first=True)


def attention_mask(batch: Packed) -> Tensor:
    """[N, L] bool, True where there is a token."""
    return torch.arange(max(batch.lengths)) < torch.tensor(batch.lengths)[:, None]
