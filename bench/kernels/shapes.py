"""The sizes at which kernels are compiled and measured: encoders, and rows as long as real sentences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Encoder:
    """The sizes of a BERT that its kernels see."""

    name: str
    width: int
    heads: int
    inner: int
    vocabulary: int = 30522
    positions: int = 512
    types: int = 2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads


BERT_BASE = Encoder("bert-base", 768, 12, 3072)
MINILM = Encoder("MiniLM", 384, 12, 1536)
NARROW_HEADS = Encoder("narrow heads", 384, 24, 1536)
WIDE_HEADS = Encoder("wide heads", 768, 6, 3072)

LONGEST = (16, 32, 64, 128, 256, 512)
"""Values of max_seqlen."""

SENTENCES = (
    *(4, 11, 14, 16, 17, 17, 18, 19, 19, 20, 20, 21, 22, 22, 23, 23, 24, 24, 25, 25, 26),
    *(27, 27, 28, 29, 29, 30, 31, 32, 33, 34, 36, 37, 39, 41, 43, 46, 49, 54, 61, 128),
)
"""Tokens of a training row: every 40th part of the distribution, from the shortest to the longest. Single sentences of
SST (24 parts) and pairs in one row of Quora (64 parts) and STS (17 parts), in BERT's WordPiece, cut to 128 tokens."""

REVIEWS = (
    *(21, 68, 84, 100, 113, 126, 138, 145, 151, 156, 160, 165, 169, 173, 176, 181, 186, 189, 195, 201, 205),
    *(210, 218, 224, 231, 238, 246, 254, 261, 273, 283, 294, 305, 323, 337, 347, 361, 379, 399, 432, 512),
)
"""The same of the film reviews of CFIMDB, cut to 512 tokens."""


def draw_lengths(distribution: tuple[int, ...], tokens: int, seed: int = 0) -> np.ndarray:
    """Lengths of rows of `tokens` tokens in all, drawn from a distribution that is given by its quantiles.

    Between two quantiles all lengths are as likely. The last row is cut where the tokens end.
    """
    generator = np.random.default_rng(seed)
    steps = np.linspace(0.0, 1.0, len(distribution))
    enough = generator.uniform(size=max(16, 2 * tokens // int(np.mean(distribution)) + 16))
    lengths = np.round(np.interp(enough, steps, distribution)).astype(np.int64)
    ends = np.cumsum(lengths)
    count = int(np.searchsorted(ends, tokens)) + 1
    drawn = lengths[:count].copy()
    drawn[-1] -= ends[count - 1] - tokens
    return drawn
