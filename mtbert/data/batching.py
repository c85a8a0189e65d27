"""Batches of one task: shuffled, reproducible, and nearly equal in tokens."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np

_WINDOW = 64


class TaskBatches:
    """The endless sequence of batches of a task; `batch(index)` is a pure function of (seed, name, index).

    A cycle is `len(self)` batches and holds every example exactly once; the last batch of a cycle may be
    smaller, all others have `batch_size` examples. Every cycle has an order of its own.

    A cycle is a random permutation, cut into windows of some dozens of batches. The examples of a window are
    sorted by length and dealt: of every run of neighbours, one goes to each batch of the window, at random.
    So every batch has short and long examples in equal parts, and nearly the same number of tokens, while
    each example is equally likely to meet any other.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, name: str) -> None:
        """`lengths` [n] are the tokens of every example."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        if len(lengths) == 0:
            raise ValueError(f"task {name} has no examples")
        self._lengths = np.asarray(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._name = name
        self._cached: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Batches in a cycle."""
        return -(-len(self._lengths) // self._batch_size)

    def batch(self, index: int) -> np.ndarray:
        """The example indices, int64, of batch `index` (from 0, counted over all cycles)."""
        if index < 0:
            raise ValueError(f"batch index is {index}, expected 0 or more")
        cycle, place = divmod(index, len(self))
        if self._cached is None or self._cached[0] != cycle:
            self._cached = cycle, self._order(cycle)
        return self._cached[1][place * self._batch_size : (place + 1) * self._batch_size].copy()

    def _order(self, cycle: int) -> np.ndarray:
        # Raw words of a counter-based generator: unlike numpy's distributions, they do not change between
        # versions.
        digest = hashlib.sha256(f"{self._seed}\n{self._name}\n{cycle}".encode()).digest()
        generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

        size = self._batch_size
        order = np.argsort(generator.random_raw(len(self._lengths)), kind="stable")
        windows = -(-len(self) // _WINDOW)
        bounds = [len(self) * w // windows * size for w in range(windows)] + [len(order)]
        for begin, end in pairwise(bounds):
            window = order[begin:end]
            window = window[np.argsort(self._lengths[window], kind="stable")]
            order[begin:end] = _deal(window, size, generator)
        return order


def _deal(examples: np.ndarray, size: int, generator: np.random.Philox) -> np.ndarray:
    """Deals examples, sorted by length, into batches of `size`; the rest is a smaller last batch."""
    rest = len(examples) % size
    small = np.zeros(0, dtype=np.int64)
    if rest:
        # One example out of each of `rest` equal runs, so that the small batch is as mixed as the others.
        bounds = np.arange(rest + 1) * len(examples) // rest
        chosen = bounds[:-1] + (generator.random_raw(rest) % np.diff(bounds).astype(np.uint64)).astype(
            np.int64
        )
        small = examples[chosen]
        examples = np.delete(examples, chosen)
    strata = examples.reshape(size, -1)  # a run of neighbours in length per line, a batch per column
    if strata.shape[1] > 1:
        keys = generator.random_raw(strata.size).reshape(strata.shape)
        strata = np.take_along_axis(strata, np.argsort(keys, axis=1, kind="stable"), axis=1)
    return np.concatenate([strata.T.reshape(-1), small])
