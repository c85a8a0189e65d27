"""Alignment and uniformity of sentence embeddings (Wang and Isola 2020, "Understanding Contrastive Representation
Learning through Alignment and Uniformity on the Hypersphere"), on a table's texts.

The embeddings come from whoever has a model: `probe` says which texts of a table to embed, `Probe.measure` takes
their embeddings.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task

POSITIVE_SIMILARITY = 0.8
"""Share of the range of scores from which on a pair is positive: 4 of STS's 0 to 5, as in Gao et al. 2021."""

_CHUNK = 1024


@dataclass(frozen=True)
class EmbeddingQuality:
    """Both measures; lower is better, and embeddings that all agree are perfectly aligned and not at all uniform."""

    alignment: float | None
    """None where the table has no positive pairs."""
    uniformity: float
    pairs: int
    """Positive pairs that alignment is the mean of."""
    sentences: int
    """Texts that uniformity is taken over."""

    def to_json(self) -> dict[str, float | int | None]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Probe:
    """What to embed of a table: texts int64 [m], numbers of its texts; pairs int64 [p, 2], places in `texts`."""

    texts: np.ndarray
    pairs: np.ndarray

    def measure(self, embeddings: np.ndarray) -> EmbeddingQuality:
        """Quality of the embeddings [m, C] of `texts`."""
        if len(embeddings) != len(self.texts):
            raise ValueError(f"expected {len(self.texts)} embeddings, found {len(embeddings)}")
        first, second = embeddings[self.pairs[:, 0]], embeddings[self.pairs[:, 1]]
        return EmbeddingQuality(
            alignment(first, second) if len(first) else None,
            uniformity(embeddings),
            len(self.pairs),
            len(self.texts),
        )


def probe(task: Task, labels: np.ndarray, examples: np.ndarray) -> Probe:
    """All texts of these examples (int64, indices into the table), and those pairs that are positive.

    Positive are the paraphrases of a binary pair task, and pairs of a similarity of at least 4 on a scale from 0 to
    5; single sentences and other pairs have no positives.
    """
    if not task.is_pair:
        return Probe(np.asarray(examples, dtype=np.int64), np.zeros((0, 2), dtype=np.int64))
    texts = (2 * np.asarray(examples, dtype=np.int64)[:, None] + np.array([0, 1])).reshape(-1)
    if task.score_range is not None:
        low, high = task.score_range
        positive = labels[examples] >= low + POSITIVE_SIMILARITY * (high - low)
    else:
        positive = (labels[examples] == 1) & (task.kind == "binary")
    places = np.flatnonzero(positive)
    return Probe(texts, np.stack([2 * places, 2 * places + 1], axis=1))


def alignment(first: np.ndarray, second: np.ndarray) -> float:
    """Mean of |u - v|^2 over positive pairs (rows of two [p, C], scaled to length 1)."""
    return float(np.square(_unit(first) - _unit(second)).sum(axis=1).mean())


def uniformity(embeddings: np.ndarray) -> float:
    """log of the mean of exp(-2 |u - v|^2) over all pairs of different rows of [n, C], scaled to length 1.

    0, its highest value, for fewer than two rows.
    """
    rows = _unit(embeddings)
    n = len(rows)
    if n < 2:
        return 0.0
    squares = np.square(rows).sum(axis=1)
    total = 0.0
    for i in range(0, n, _CHUNK):
        part = slice(i, i + _CHUNK)
        distances = squares[part, None] + squares - 2 * rows[part] @ rows.T
        total += np.exp(-2 * distances).sum()
    return float(
        np.log((total - n) / (n * (n - 1)))
    )  # without the n pairs of a row with itself, each counting 1


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
