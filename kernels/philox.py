"""Philox4x32-10 in PyTorch tensor arithmetic, and the dropout mask that every implementation computes.

Source: Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

LANES = 8
"""Columns that share one Philox draw: four words of two 16-bit lanes."""
HEAD_COLUMNS = 4096
"""Columns that one attention head takes in the mask: the longest row."""


@dataclass(frozen=True)
class Dropout:
    """What a dropout mask is a function of, beside the rows and columns it covers.

    p: rate in [0, 1), in steps of 1 / 65536; seed: the run's, 64 bits; step: the global step, 32 bits, or an int64
    tensor of one element on the device of the masked tensors, so that a captured graph draws new masks at every
    replay; site: the place in the model (and the forward pass within the step), 32 bits.
    """

    p: float
    seed: int
    step: int | Tensor
    site: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.p < 1.0:
            raise ValueError(f"Dropout: p must be in [0, 1), got {self.p}")
        step = self.step
        if isinstance(step, Tensor) and (step.numel() != 1 or step.dtype != torch.int64):
            found = f"{step.dtype} {list(step.shape)}"
            raise ValueError(
                f"Dropout: step must be an integer or an int64 tensor of one element, got {found}"
            )
        for name, bits in (("seed", 64), ("step", 32), ("site", 32)):
            value = getattr(self, name)
            if not isinstance(value, Tensor) and not 0 <= value < 1 << bits:
                raise ValueError(f"Dropout: {name} must be in [0, 2**{bits}), got {value}")

    @property
    def threshold(self) -> int:
        """An element is dropped where its 16-bit lane is below this."""
        return min(round(65536 * self.p), 65535)

    @property
    def scale(self) -> float:
        """What kept elements are multiplied by: the inverse of the exact share that is kept."""
        return 65536 / (65536 - self.threshold)


def philox4x32(
    key: tuple[int, int], counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words for a counter of four words and a key of two.

    key: Python integers in [0, 2**32). counter: int64 tensors (or integers) in [0, 2**32), broadcast together; at
    least one is a tensor. Returns four int64 tensors in [0, 2**32).
    """
    device = next(word.device for word in counter if isinstance(word, Tensor))
    # A number becomes a tensor by a fill: a copy from the host could not be captured in a graph.
    c0, c1, c2, c3 = torch.broadcast_tensors(
        *(
            word.to(torch.int64) if isinstance(word, Tensor) else torch.full((), word, device=device)
            for word in counter
        )
    )
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit products wrap around in int64; the mask after the arithmetic shift gives the unsigned high word.
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & WORD) ^ c1 ^ k0,
            product1 & WORD,
            ((product0 >> 32) & WORD) ^ c3 ^ k1,
            product0 & WORD,
        )
        k0 = (k0 + _WEYL[0]) & WORD
        k1 = (k1 + _WEYL[1]) & WORD
    return c0, c1, c2, c3


def keep_groups(dropout_row: Tensor, groups: Tensor, dropout: Dropout) -> Tensor:
    """Which elements are kept in whole groups of eight columns.

    dropout_row: integer [R]; groups: integer [G], group g being the columns 8 g to 8 g + 7. Returns bool [R, G, 8].
    """
    rows = dropout_row.to(torch.int64) & WORD
    words = philox4x32(
        (dropout.seed & WORD, dropout.seed >> 32),
        (groups.to(torch.int64)[None, :], rows[:, None], dropout.site, dropout.step),
    )
    lanes = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(lanes, dim=-1) >= dropout.threshold


def dropout_mask(dropout_row: Tensor, columns: Tensor, dropout: Dropout) -> Tensor:
    """The dropout mask of any rows and columns.

    dropout_row: int32 [R]; columns: integer [C]. Returns bool [R, C], True where the element is kept.
    """
    columns = columns.to(torch.int64)
    groups, place = torch.unique(columns // LANES, return_inverse=True)
    return keep_groups(dropout_row, groups, dropout)[:, place, columns % LANES]


def leading_columns_mask(dropout_row: Tensor, count: int, dropout: Dropout) -> Tensor:
    """The dropout mask of columns 0 to count - 1, bool [R, count], without reading a device value."""
    groups = torch.arange(-(-count // LANES), device=dropout_row.device)
    return keep_groups(dropout_row, groups, dropout).flatten(1)[:, :count]
